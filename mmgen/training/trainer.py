"""The training loop: one readable function over the parts that the configuration names."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from mmgen.config import save_yaml, to_mapping
from mmgen.data.loader import Counts, build_loaders, describe_counts, row_of_counts
from mmgen.objectives import IMMConfig
from mmgen.objectives.imm import LEAST_GAP_BF16
from mmgen.training.begin import begin_from
from mmgen.training.checkpoint import latest_checkpoint, load_checkpoint
from mmgen.training.faults import save_batches
from mmgen.training.feed import Part, feeds, worker_deaths
from mmgen.training.guards import Interrupt
from mmgen.training.host import keep_freed_memory
from mmgen.training.losses import loss_weights
from mmgen.training.metrics import Meters, Reporter, known_peak
from mmgen.training.parallel import forget_gathered
from mmgen.training.profile import profiled
from mmgen.training.ranks import Ranks, barrier, gathered, joined
from mmgen.training.run import (
    CHECKPOINTS,
    CONFIG_NAME,
    RunConfig,
    build,
    load_run_config,
)
from mmgen.training.saver import Saver
from mmgen.training.spikes import Spikes, merged
from mmgen.training.step import Stepper, Taken
from mmgen.training.validation import Quality, preview, validate

# what a resumed run may change without becoming another run
FREE_ON_RESUME = {
    # where the data is and how it is fetched; that it is the same data the loaders' states say
    "data.sources.*.path",
    "data.sources.*.remote",
    "data.sources.*.cache_mb",
    "data.sources.*.max_broken",
    "train.steps",
    "train.skip_budget",
    "train.workers",
    "train.replicas",
    "train.checkpointing",
    "log",
    "checkpoint",
    "preview",
    "validation",
    "plan",
    "run",
}


def train(config: RunConfig, resume: bool = False) -> Path:
    """Trains to `config.train.steps`, or until a signal asks to stop, and returns the last checkpoint.

    Under torchrun all its processes train one model together. Raises ValueError where the run exists and `resume` is
    not set, or where what is resumed is another run.
    """
    with joined() as ranks:
        return _train(config, resume, ranks)


def _train(config: RunConfig, resume: bool, ranks: Ranks) -> Path:
    run = Path(config.run)
    part = Part(config.train.micro_batches, ranks.rank, ranks.num_ranks)
    part.check_streams(config.data.streams, config.train.workers)
    latest = _checkpoint_to_resume(run, config, resume)
    keep_freed_memory()
    torch.manual_seed(config.seed)
    parts = build(config)
    begun = None
    if config.train.begin_from is not None and latest is None:
        begun = begin_from(parts.model, config.train.begin_from)
    stepper = Stepper(config, parts, ranks)
    loaders = build_loaders(config.data, parts.modalities, config.seed, parts.objective.grouping)
    wanted = config.validation.every and config.validation.pictures
    quality = Quality(config, ranks) if wanted else None
    barrier()  # all have looked for what is there already
    if ranks.rank == 0:
        save_yaml(config, run / CONFIG_NAME)  # not before everything that the configuration names was built
    step, seen = 0, Counter(samples=0, tokens=0, pictures=0)
    if latest is not None:
        scalars = load_checkpoint(latest, stepper.tensors())
        step, seen, stepper.guard.skipped = scalars["step"], Counter(scalars["seen"]), scalars["skipped"]
        for loader, state in zip(loaders, scalars["loaders"], strict=True):
            loader.load_state(state)
    saved = step if latest is not None else -1

    saver = Saver(run / CHECKPOINTS, config.checkpoint)

    def save(states: list[dict[str, Any]]) -> None:
        everyones = gathered(states)  # each rank's are new for its own streams only
        states = [everyones[stream % ranks.num_ranks][stream] for stream in range(len(states))]
        scalars = {"step": step, "seen": dict(seen), "skipped": stepper.guard.skipped, "loaders": states}
        saver.save(step, stepper.tensors(), scalars)

    states = [loader.state() for loader in loaders]
    num_steps = config.train.steps
    ready = feeds(
        loaders,
        parts.objective,
        config.seed,
        stepper.attention.backend,
        step=step,
        total_steps=num_steps,
        workers=config.train.workers,
        joint=config.joint,
        part=part,
    )
    meters, spikes = Meters(), Spikes(loss_weights(stepper.parts))
    told, treated = "", Counter()
    peak = known_peak(ranks.device)
    resolved = to_mapping(config)
    report = Reporter(
        run, config.log, total_steps=num_steps, step=step, seen=seen, resolved=resolved, peak=peak
    )
    watched = profiled(config.log, run, step, ranks.rank)
    with (
        worker_deaths(),
        Interrupt() as interrupt,
        report,
        closing(saver),
        closing(ready),
        watched as step_done,
    ):
        report.say(_describe(config, stepper, latest))
        for warning in (near_passes(config), emulated(config, ranks.device)):
            if warning is not None:
                report.say(warning)
        if begun is not None:
            report.say(begun)
        while step < num_steps and not interrupt.requested():
            own = []
            with report.waiting():
                for _ in range(part.num_own):
                    feed, states = next(ready)
                    own.append(feed)
                    treated = feed.treated
            if peak is not None:
                report.worked(stepper.flops(own))
            taken = stepper.take(step, own)
            step += 1
            seen.update(taken.seen)
            if not taken.finite:
                fault = save_batches(run, step, ranks.rank, own, loss=taken.loss, grad_norm=taken.grad_norm)
                stepper.guard.check(str(fault))
                report.say(f"step {step} was left out, its loss or gradient is not finite: see {fault}")
            _watch(taken, step, meters, spikes, report, ranks)
            report.advance(step, seen)
            if step % config.log.every == 0 or step == num_steps:
                # with the rows, since totals grow with every shard that is read
                met: Counts = sum(gathered(treated), Counter())
                if (heard := describe_counts(met)) != told:
                    report.say(f"data: {(told := heard)}")
                means = meters.read()
                values = {"loss": means.pop("loss"), **means, "lr": taken.lr, **row_of_counts(met)}
                report.row(step, seen, values)
            _look(stepper, step, seen, quality, report, interrupt.requested)
            if step % config.checkpoint.every == 0:
                save(states)
                saved = step
            step_done()
        if saved != step:
            save(states)
        saver.wait()
        path = latest_checkpoint(run / CHECKPOINTS)
        assert path is not None
        report.say(f"{'finished' if step >= num_steps else 'stopped'} at step {step} of {num_steps}: {path}")
    return path


def _watch(taken: Taken, step: int, meters: Meters, spikes: Spikes, report: Reporter, ranks: Ranks) -> None:
    """Adds a step to the means of the next row, and says where its loss leapt up."""
    for losses in taken.losses:
        for name, each in losses.items():
            meters.add(f"{name}_loss", each.total, each.count)
    cells = taken.cells
    if spikes.is_leap(taken.whole):
        cells = merged(gathered(cells))
    if spike := spikes.see(taken.whole, cells):
        report.note(step, f"step {step}: {spike}", spike.row())
    meters.add("loss", taken.loss, 1 / ranks.num_ranks)
    meters.add("grad_norm", taken.grad_norm)


def _look(
    stepper: Stepper,
    step: int,
    seen: Mapping[str, int],
    quality: Quality | None,
    report: Reporter,
    stop: Callable[[], bool],
) -> None:
    """Validates and draws previews with the averaged weights where they are due; leaves off once `stop` says so."""
    config, parts, ranks = stepper.config, stepper.parts, stepper.ranks
    num_steps = config.train.steps
    if _due(config.validation.every, step, num_steps):
        with _averaged(stepper):
            values = validate(parts, config, ranks, stop)
            if quality is not None:
                values |= quality.measure(parts, stop)
            report.row(step, seen, values)
    if _due(config.preview.every, step, num_steps) and config.preview.prompts:
        with _averaged(stepper):
            if drawn := preview(parts, config, ranks, step, stop):
                report.picture(step, drawn)


@contextmanager
def _averaged(stepper: Stepper) -> Iterator[None]:
    """Within the context the model has the averaged weights."""
    with stepper.emas["ema"].swapped(stepper.model):
        yield
        forget_gathered(stepper.model)


def _due(every: int, step: int, total: int) -> bool:
    return every > 0 and (step % every == 0 or step == total)


def _checkpoint_to_resume(run: Path, config: RunConfig, resume: bool) -> Path | None:
    """The checkpoint to continue from, None for a new run. Raises ValueError where `config` may not go on there."""
    latest = latest_checkpoint(run / CHECKPOINTS)
    if not resume:
        if latest is not None:
            raise ValueError(
                f"{run} already holds a run at {latest.name}: add --resume, or choose another --run"
            )
        return None
    if latest is None:
        raise ValueError(f"--resume: {run} holds no checkpoint to continue from; leave --resume out to begin")
    old = load_run_config(run)
    changed = [key for key in _differences(to_mapping(old), to_mapping(config)) if not _is_free(key)]
    if changed:
        raise ValueError(
            f"--resume: {run} was trained with other values of {', '.join(changed)}; "
            f"only {', '.join(sorted(FREE_ON_RESUME))} may change"
        )
    return latest


def _is_free(key: str) -> bool:
    return any(fnmatchcase(key, free) or fnmatchcase(key, f"{free}.*") for free in FREE_ON_RESUME)


def _differences(old: Any, new: Any, where: str = "") -> list[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = list(dict.fromkeys([*old, *new]))
        return [
            path
            for key in keys
            for path in _differences(old.get(key), new.get(key), f"{where}.{key}".lstrip("."))
        ]
    return [] if old == new else [where]


def near_passes(config: RunConfig) -> str | None:
    """What to say where bfloat16 cannot tell IMM's two passes apart (`benchmarks.imm_precision`)."""
    objective = config.objective
    if not isinstance(objective, IMMConfig) or config.train.precision != "bf16":
        return None
    if objective.gap >= LEAST_GAP_BF16:
        return None
    return (
        f"warning: objective.gap {objective.gap:g} in bf16: what its two passes differ by is lost near the noise; "
        f"a gap of {LEAST_GAP_BF16:g} keeps it, or train.precision float32 (docs/imm.md, Precision)"
    )


def emulated(config: RunConfig, device: torch.device) -> str | None:
    """What to say where a processor has no instructions for bfloat16."""
    if device.type != "cpu" or config.train.precision != "bf16":
        return None
    able = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch
    if able.get("architecture") != "x86_64" or able.get("avx512_bf16") or able.get("amx_bf16"):
        return None
    return (
        "warning: train.precision bf16 on a processor without instructions for it (AVX512_BF16, AMX): "
        "float32 may take less time"
    )


def _describe(config: RunConfig, stepper: Stepper, latest: Path | None) -> str:
    begin = f"resuming {latest}" if latest is not None else f"training {config.run}"
    return f"{begin}: {stepper.describe()}"
