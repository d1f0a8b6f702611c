"""What a run tells: `metrics.jsonl` (the truth), a live line on a terminal or plain lines elsewhere, wandb on top.

Only the first rank writes. Nothing here decides anything about training.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from torch import Tensor

from mmgen.devices import peak_flops
from mmgen.files import write_text
from mmgen.training.ranks import current_rank, gathered

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class LogConfig:
    """What a run reports and where."""

    every: int = 20
    """Steps between rows of metrics.jsonl."""
    wandb_project: str | None = None
    """Also log to this project of Weights & Biases."""
    wandb_mode: Literal["online", "offline"] = "online"
    """offline: keep the wandb run in the run's folder, for `wandb sync`."""
    profile: tuple[int, int] | None = None
    """First and last step (counted from 1) of a window under torch's profiler; its trace is in the run's folder."""
    memory_snapshot: bool = False
    """Record the GPU's allocations, for pytorch.org/memory_viz; slows training down."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every must be at least 1, is {self.every}")
        if self.profile is not None and not 1 <= self.profile[0] <= self.profile[1]:
            raise ValueError(f"profile {list(self.profile)} must be two steps, 1 <= first <= last")


class Meters:
    """Means over the steps between two rows: sums and counts, kept on the device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Any, Any]] = {}

    def add(self, name: str, total: Tensor | float, count: Tensor | float = 1) -> None:
        """Adds a `total` over `count` things (tokens, pictures, steps); tensors cause no synchronisation here."""
        total = total.detach() if isinstance(total, Tensor) else total
        old_total, old_count = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (old_total + total, old_count + count)

    def read(self) -> dict[str, float]:
        """Returns the mean of each name over all ranks and starts anew; a name that counted nothing is left out."""
        sums = {name: (float(total), float(count)) for name, (total, count) in self._sums.items()}
        self._sums = {}
        totals: dict[str, tuple[float, float]] = {}
        for name, (total, count) in (item for part in gathered(sums) for item in part.items()):
            old_total, old_count = totals.get(name, (0.0, 0.0))
            totals[name] = (old_total + total, old_count + count)
        return {name: total / count for name, (total, count) in totals.items() if count}


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, `step` first, flushed line by line.

    Opened at `step`, it drops the rows of later steps (they will be written again), so that a resumed run reads as if
    it had never stopped. Rows of the step of a checkpoint must therefore be written before that checkpoint.
    """

    def __init__(self, path: Path | str, step: int = 0):
        self.path = Path(path)
        kept = [row for row in read_metrics(self.path) if row["step"] <= step] if step else []
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """Returns the rows of a metrics.jsonl; a last line that a kill cut short is left out, no file gives no rows.

    Raises ValueError where any other line is no row.
    """
    path = Path(path)
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    rows = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last line break was not finished
        try:
            row = json.loads(line)
            if not isinstance(row["step"], int):
                raise TypeError
        except (json.JSONDecodeError, TypeError, KeyError):
            raise ValueError(f"{path}, line {number}: not a row of metrics: {line[:60]!r}") from None
        rows.append(row)
    return rows


class Reporter:
    """Reports a run that begins at `step` of `total_steps`; a context manager.

        with Reporter(run, LogConfig(), total_steps=1000, step=step, seen=seen, resolved=config) as report:
            with report.waiting():                        # what is no step's work
                batch = next(batches)
            report.worked(flops)                          # of this rank, where the device's peak is known
            report.advance(step, seen)                    # each step: moves the live line
            report.row(step, seen, {"loss": ...})         # each `every` steps: metrics.jsonl, wandb, the log
            report.say("saved ...")                       # a line above the live one

    `seen` counts what the run was trained on so far (samples, tokens, pictures). Rows have these counts, and over the
    steps since the last row: how many of each `_per_second`, the share of the time that was spent waiting for data
    (`data_wait`), `mfu` where the peak is known, and the most memory that was in use (`memory_gb`). On a terminal a
    validation's row is said, not kept in the live line.
    """

    def __init__(
        self,
        run: Path | str,
        config: LogConfig,
        *,
        total_steps: int,
        step: int = 0,
        seen: Mapping[str, int] | None = None,
        resolved: Mapping[str, Any] | None = None,
        peak: float | None = None,
        console: Console | None = None,
    ):
        self.run, self.config, self.total_steps = Path(run), config, total_steps
        self._first = current_rank() == 0
        self._console = console or Console()
        self._start, self._resolved = step, resolved
        self._peak = peak  # operations a second of the device
        self._mark = (time.perf_counter(), step, dict(seen or {}))  # of the last row
        self._waited = self._flops = 0.0  # since then
        self._file: MetricsFile | None = None
        self._wandb: Any = None
        self._progress: Progress | None = None

    def __enter__(self) -> "Reporter":
        if not self._first:
            return self
        self._file = MetricsFile(self.run / METRICS, self._start)
        self._wandb = None
        if self.config.wandb_project:
            self._wandb = open_wandb(self.run, self.config, self._resolved or {})
        if self._console.is_terminal:
            columns = (
                SpinnerColumn(),
                MofNCompleteColumn(),
                BarColumn(bar_width=20),
                # below each other: a terminal is narrower than a line of a log
                TextColumn("{task.fields[rate]}\n{task.fields[losses]}"),
            )
            self._progress = Progress(*columns, console=self._console)
            self._progress.add_task("", total=self.total_steps, completed=self._start, rate="", losses="")
            self._progress.start()
        self._mark = (time.perf_counter(), *self._mark[1:])
        return self

    def __exit__(self, *exception: object) -> None:
        if self._progress:
            self._progress.stop()
        if self._file:
            self._file.close()
        if self._wandb:
            self._wandb.finish(exit_code=0 if exception[0] is None else 1)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time within as waiting for data."""
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin

    def worked(self, flops: float) -> None:
        """Counts operations of this rank's step, for `mfu`."""
        self._flops += flops

    def advance(self, step: int, seen: Mapping[str, int]) -> None:
        """Moves the live line to `step` (steps done)."""
        if self._progress:
            rate = self._speed(step, seen)[1]
            self._progress.update(self._progress.task_ids[0], completed=step, rate=rate)

    def row(self, step: int, seen: Mapping[str, int], values: Mapping[str, float | int]) -> None:
        """Writes a row: `step`, `seen`, `values` (whose losses are shown) and, where steps were done, their speed.

        A second row of one step, such as a validation's, has no speed, and the time it took is not counted in the next.
        """
        if not self._first:
            return
        assert self._file, "rows are written within the context"
        row: dict[str, Any] = {**seen, **values}
        rate = ""
        if step > self._mark[1]:
            speed, rate = self._speed(step, seen)
            row |= speed
        self._file.write(step, row)
        if self._wandb:
            self._wandb.log({"step": step, **row})
        shown = [
            f"{name} {value:.4g}"
            for name, value in values.items()
            if name.endswith(("loss", "bits_per_byte")) or name.startswith("validation_kid")
        ]
        shown += [f"{name} {values[name]:.3g}" for name in ("grad_norm", "lr") if name in values]
        if self._progress and rate:
            task = self._progress.task_ids[0]
            self._progress.update(task, completed=step, rate=rate, losses="  ".join(shown))
        else:
            self._print("  ".join([f"step {step}/{self.total_steps}", *shown, *([rate] if rate else [])]))
        self._mark = (time.perf_counter(), step, dict(seen))
        self._waited = self._flops = 0.0

    def picture(self, step: int, path: Path) -> None:
        """Says where a preview is, and hands it to wandb."""
        self.say(f"preview {path}")
        if self._wandb:
            import wandb

            self._wandb.log({"step": step, "preview": wandb.Image(str(path))})

    def note(self, step: int, message: str, values: Mapping[str, Any]) -> None:
        """Prints a line on something that happened at `step`, and writes its `values` as a row of their own."""
        if self._first:
            assert self._file, "rows are written within the context"
            self._file.write(step, values)
            if self._wandb:
                self._wandb.log({"step": step, **values})
        self.say(message)

    def say(self, message: str) -> None:
        """Prints one line."""
        if self._first:
            self._print(message)

    def _print(self, message: str) -> None:
        # Plain: no wrapping at the width of a terminal that is not there, no markup in paths.
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)

    def _speed(self, step: int, seen: Mapping[str, int]) -> tuple[dict[str, float], str]:
        """Values of a row on the steps since the last one, and the same with the time left as text."""
        time_then, step_then, seen_then = self._mark
        seconds = max(time.perf_counter() - time_then, 1e-9)
        per_second = {name: (count - seen_then.get(name, 0)) / seconds for name, count in seen.items()}
        values = {f"{name}_per_second": round(value, 3) for name, value in per_second.items()}
        values |= {"data_wait": round(self._waited / seconds, 5), "memory_gb": round(memory_gb(), 3)}
        shown = [f"{_short(value)} {name}/s" for name, value in per_second.items()]
        if self._peak is not None:
            values["mfu"] = round(self._flops / seconds / self._peak, 5)
            shown.append(f"MFU {values['mfu']:.1%}")
        shown += [f"wait {values['data_wait']:.0%}", f"{values['memory_gb']:.1f} GB"]
        left = (self.total_steps - step) * seconds / max(step - step_then, 1)
        return values, "  ".join([*shown, f"{_clock(left)} left"])


def open_wandb(run: Path, config: LogConfig, resolved: Mapping[str, Any]) -> Any:
    """The wandb run of a run's folder: one, however often it is opened. Raises ValueError where wandb is missing."""
    try:
        import wandb
    except ImportError:
        raise ValueError(
            "log.wandb_project is set and wandb is not installed: pip install 'mmgen-pretrain[log]'"
        ) from None
    name = run / "wandb_run"
    if not name.exists():
        write_text(name, os.urandom(4).hex())
    opened = wandb.init(
        project=config.wandb_project,
        dir=str(run),
        id=name.read_text(),
        name=run.name,
        mode=config.wandb_mode,
        resume="allow",
        config=dict(resolved),
        settings=wandb.Settings(silent=True),
    )
    # wandb's own step must grow and would drop what a resumed run repeats; ours is a metric like any other.
    opened.define_metric("step", hidden=True)
    opened.define_metric("*", step_metric="step")
    return opened


def known_peak(device: torch.device) -> float | None:
    """Operations a second of the device, None where they are not known (see `peak_flops`)."""
    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def memory_gb() -> float:
    """The most memory that was in use: of the GPU, or of this process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 1e9 if sys.platform == "darwin" else most * 1024 / 1e9


def _short(value: float) -> str:
    """Three digits, thousands and millions by a letter."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
