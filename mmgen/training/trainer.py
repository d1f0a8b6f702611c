"""The training loop: one readable function over the parts that the configuration names."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_

from mmgen.config import save_yaml, to_mapping
from mmgen.data.loader import build_loaders
from mmgen.devices import peak_flops
from mmgen.model.attention import AttentionBackend, Choice, choose_backend
from mmgen.model.model import Model
from mmgen.sampling.predict import ModelFacts
from mmgen.training.begin import begin_from
from mmgen.training.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    optimizer_state,
)
from mmgen.training.ema import Ema
from mmgen.training.faults import save_batches
from mmgen.training.feed import Part, feeds
from mmgen.training.flops import Work, step_flops
from mmgen.training.guards import FiniteGuard, Interrupt
from mmgen.training.host import keep_freed_memory
from mmgen.training.losses import compute_losses, seen_in, token_counts, weighted
from mmgen.training.metrics import Meters, Reporter
from mmgen.training.optim import build_optimizer, freeze, learning_rate, set_learning_rate
from mmgen.training.parallel import build_mesh, forget_gathered, shard
from mmgen.training.profile import profiled
from mmgen.training.ranks import Ranks, barrier, gathered, joined, summed, total
from mmgen.training.run import (
    CHECKPOINTS,
    CONFIG_NAME,
    Parts,
    RunConfig,
    build,
    load_run_config,
)
from mmgen.training.saver import Saver
from mmgen.training.spikes import Spikes, merged, tally
from mmgen.training.validation import Quality, preview, validate

# what a resumed run may change without becoming another run
FREE_ON_RESUME = {
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
    run, device = Path(config.run), ranks.device
    part = Part(config.train.micro_batches, ranks.rank, ranks.num_ranks)
    part.check_streams(config.data.streams, config.train.workers)
    latest = _checkpoint_to_resume(run, config, resume)
    keep_freed_memory()
    torch.manual_seed(config.seed)
    parts = build(config)
    begun = None
    if config.train.begin_from is not None and latest is None:
        begun = begin_from(parts.model, config.train.begin_from)
    attention = choose_backend(config.train.attention, device, config.model.head_dim, config.train.precision)
    model = _prepare(parts, config, attention.backend, ranks)
    emas = {name: Ema(model, decay) for name, decay in config.train.averages().items()}
    optimizer = build_optimizer(model, config.optim)
    loaders = build_loaders(config.data, parts.modalities, config.seed, parts.objective.grouping)
    guard = FiniteGuard(config.train.skip_budget)
    wanted = config.validation.every and config.validation.pictures
    quality = Quality(config, ranks) if wanted else None

    def tensors() -> dict[str, Any]:
        averages = {name: ema.state_dict() for name, ema in emas.items()}
        return {"model": model.state_dict(), **averages, "optimizer": optimizer_state(model, optimizer)}

    barrier()  # all have looked for what is there already
    if ranks.rank == 0:
        save_yaml(config, run / CONFIG_NAME)  # not before everything that the configuration names was built
    step, seen = 0, Counter(samples=0, tokens=0, pictures=0)
    if latest is not None:
        scalars = load_checkpoint(latest, tensors())
        step, seen, guard.skipped = scalars["step"], Counter(scalars["seen"]), scalars["skipped"]
        for loader, state in zip(loaders, scalars["loaders"], strict=True):
            loader.load_state(state)
    saved = step if latest is not None else -1

    saver = Saver(run / CHECKPOINTS, config.checkpoint)

    def save(states: list[dict[str, Any]]) -> None:
        everyones = gathered(states)  # each rank's are new for its own streams only
        states = [everyones[stream % ranks.num_ranks][stream] for stream in range(len(states))]
        scalars = {"step": step, "seen": dict(seen), "skipped": guard.skipped, "loaders": states}
        saver.save(step, tensors(), scalars)

    states = [loader.state() for loader in loaders]
    num_steps = config.train.steps
    ready = feeds(
        loaders,
        parts.objective,
        config.seed,
        attention.backend,
        step=step,
        total_steps=num_steps,
        workers=config.train.workers,
        joint=config.joint,
        part=part,
    )
    meters, spikes = Meters(), Spikes()
    heard = told = ""
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    facts = ModelFacts.of(parts.model, parts.modalities, parts.objective)
    resolved = to_mapping(config)
    report = Reporter(
        run, config.log, total_steps=num_steps, step=step, seen=seen, resolved=resolved, peak=peak
    )
    watched = profiled(config.log, run, step, ranks.rank)
    with Interrupt() as interrupt, report, closing(saver), watched as step_done:
        report.say(_describe(config, parts, attention, ranks, latest))
        if begun is not None:
            report.say(begun)
        while step < num_steps and not interrupt.requested():
            own = []
            with report.waiting():
                for _ in range(part.num_own):
                    feed, states = next(ready)
                    own.append(feed)
                    heard = feed.remarks or heard
            # of the whole step, so that a batch with few tokens of a kind weighs no more by it
            of_step, new = Counter[str](), Counter[str]()
            for feed in own:
                of_step.update(token_counts(parts, feed))
                new.update(seen_in(feed.batch))
            of_step = summed(of_step)
            seen.update(summed(new))
            if peak is not None:
                works = [Work.attended(feed.batch, feed.windows) for feed in own]
                report.worked(
                    sum(step_flops(facts, each, parts.objective.needs_target).total for each in works)
                )
            set_learning_rate(optimizer, lr := learning_rate(config.optim, step, num_steps))
            model.train()
            loss, found = torch.zeros((), device=device), []
            for feed in own:
                losses = compute_losses(parts, feed, config.train.precision, device)
                share = weighted(parts, losses, of_step)
                (share * ranks.num_ranks).backward()  # since gradients are averaged over ranks
                loss = loss + share.detach()
                for name, each in losses.items():
                    meters.add(f"{name}_loss", each.total, each.count)
                found.append(
                    {name: replace(each, total=each.total.detach()) for name, each in losses.items()}
                )
            norm = clip_grad_norm_(model.parameters(), config.optim.grad_clip or float("inf"))
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            if guard.passes(step + 1, loss=loss, grad_norm=norm):
                optimizer.step()
                for ema in emas.values():
                    ema.update(model, step)
            else:
                fault = save_batches(run, step + 1, ranks.rank, own, loss=loss, grad_norm=norm)
                guard.check(str(fault))
                report.say(f"step {step + 1} was left out, its loss or gradient is not finite: see {fault}")
            optimizer.zero_grad(set_to_none=True)
            step += 1
            whole, cells = total(loss), tally(own, found)
            if spikes.is_leap(whole):
                cells = merged(gathered(cells))
            if spike := spikes.see(whole, cells):
                report.note(step, f"step {step}: {spike}", spike.row())
            meters.add("loss", loss, 1 / ranks.num_ranks)
            meters.add("grad_norm", norm)
            report.advance(step, seen)
            if step % config.log.every == 0 or step == num_steps:
                if heard != told:  # with the rows, since totals grow with every shard that is read
                    report.say(f"data: {(told := heard)}")
                means = meters.read()
                report.row(step, seen, {"loss": means.pop("loss"), **means, "lr": lr})
            if _due(config.validation.every, step, num_steps):
                with _averaged(emas["ema"], model):
                    values = validate(parts, config, ranks, interrupt.requested)
                    if quality is not None:
                        values |= quality.measure(parts, interrupt.requested)
                    report.row(step, seen, values)
            if _due(config.preview.every, step, num_steps) and config.preview.prompts:
                with _averaged(emas["ema"], model):
                    if drawn := preview(parts, config, ranks, step, interrupt.requested):
                        report.picture(step, drawn)
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


def _prepare(parts: Parts, config: RunConfig, backend: AttentionBackend, ranks: Ranks) -> Model:
    """The model where and as it is trained: frozen, checkpointed, compiled and sharded as configured, in this order."""
    model = parts.model.to(torch.float64 if config.train.precision == "float64" else torch.float32)
    freeze(model, config.optim)
    model.trunk.checkpoint_blocks(config.train.checkpointing)
    if config.train.compile:
        if backend not in ("dense", "flex"):
            raise ValueError(
                f"train.compile needs train.attention dense or flex: {backend} has other shapes in every batch"
            )
        model.trunk.compile_blocks()
    if ranks.num_ranks > 1:
        shard(model, build_mesh(ranks, config.train.replicas), config.train.precision)
    elif config.train.replicas != 1:
        raise ValueError(f"train.replicas {config.train.replicas} does not divide the one rank there is")
    return model.to(ranks.device)


@contextmanager
def _averaged(ema: Ema, model: Model) -> Iterator[None]:
    """Within the context the model has the averaged weights."""
    with ema.swapped(model):
        yield
        forget_gathered(model)


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
    return any(key == free or key.startswith(f"{free}.") for free in FREE_ON_RESUME)


def _differences(old: Any, new: Any, where: str = "") -> list[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = list(dict.fromkeys([*old, *new]))
        return [
            path
            for key in keys
            for path in _differences(old.get(key), new.get(key), f"{where}.{key}".lstrip("."))
        ]
    return [] if old == new else [where]


def _describe(config: RunConfig, parts: Parts, attention: Choice, ranks: Ranks, latest: Path | None) -> str:
    begin = f"resuming {latest}" if latest is not None else f"training {config.run}"
    where = f"{ranks.num_ranks} x {ranks.device.type}" if ranks.num_ranks > 1 else ranks.device.type
    return (
        f"{begin}: {parts.model.num_parameters() / 1e6:.2f}M parameters, {config.objective.name}, "
        f"{config.train.precision}, {attention.backend} attention ({attention.why}), on {where}"
    )
