"""A window of steps under torch's profiler, and the GPU's memory as its allocator saw it; both for who looks closer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from mmgen.training.metrics import LogConfig

PROFILE = "profile"


@contextmanager
def profiled(config: LogConfig, run: Path, step: int, rank: int) -> Iterator[Callable[[], None]]:
    """Within the context of a run that stands at `step`, gives what is to be called after each step.

    With `log.profile` [first, last] the steps from the first to the last (counted from 1) are in
    `RUN/profile/steps-<first>-<last>-rank-<rank>.json` (for Perfetto or chrome://tracing). With `log.memory_snapshot`
    the allocations of the GPU are in `memory-rank-<rank>.pickle` (for pytorch.org/memory_viz) once the context ends,
    also where it ends for want of memory. Raises ValueError where there is no GPU for that, or the steps are past.
    """
    folder = run / PROFILE
    if config.memory_snapshot:
        if not torch.cuda.is_available():
            raise ValueError("log.memory_snapshot needs a CUDA device: it is of the GPU's allocator")
        torch.cuda.memory._record_memory_history()
    try:
        if config.profile is None:
            yield lambda: None
        else:
            first, last = config.profile
            if first <= step:
                raise ValueError(
                    f"log.profile {list(config.profile)}: the run is past step {first} already ({step})"
                )
            path = folder / f"steps-{first}-{last}-rank-{rank}.json"
            with _window(first - step - 1, last - first + 1, path) as profiler:
                yield profiler.step
    finally:
        if config.memory_snapshot:
            folder.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(folder / f"memory-rank-{rank}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)


def _window(skipped: int, num_steps: int, path: Path) -> profile:
    """A profiler of `num_steps` steps after so many; one before them, where there is one, warms it up."""

    def export(profiler: profile) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    warmup = min(skipped, 1)
    steps = schedule(wait=skipped - warmup, warmup=warmup, active=num_steps, repeat=1)
    return profile(activities=activities, schedule=steps, on_trace_ready=export, with_flops=True)
