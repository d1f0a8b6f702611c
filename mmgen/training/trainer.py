"""The training loop: one readable function over the parts that the configuration names."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from mmgen.config import save_yaml, to_mapping
from mmgen.data.loader import DataConfig, build_loaders
from mmgen.evaluation.grid import picture_grid
from mmgen.model.attention import AttentionBackend, choose_backend
from mmgen.model.joint import label_windows
from mmgen.model.model import Target, plan_batch
from mmgen.objectives import Objective, text_loss
from mmgen.objectives.draw import NoisyState
from mmgen.sampling.sampler import Sampler
from mmgen.sequence import NO_LABEL, Stream, move
from mmgen.training.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    optimizer_state,
    prune,
    save_checkpoint,
)
from mmgen.training.ema import Ema
from mmgen.training.feed import Feed, feeds
from mmgen.training.guards import FiniteGuard, Interrupt
from mmgen.training.host import keep_freed_memory
from mmgen.training.metrics import Meters, Reporter
from mmgen.training.optim import build_optimizer, learning_rate, set_learning_rate
from mmgen.training.run import (
    CHECKPOINTS,
    CONFIG_NAME,
    Parts,
    RunConfig,
    build,
    default_device,
    find_checkpoint,
    load_run_config,
)

# what a resumed run may change without becoming another run
FREE_ON_RESUME = {
    "train.steps",
    "train.skip_budget",
    "train.workers",
    "log",
    "checkpoint",
    "preview",
    "validation",
    "plan",
    "run",
}


@dataclass(frozen=True)
class Loss:
    """The sum of a modality's losses over its tokens, and their count."""

    total: Tensor
    count: Tensor

    def mean(self) -> Tensor:
        return self.total / self.count.clamp(min=1)


def compute_losses(parts: Parts, feed: Feed, precision: str, device: torch.device) -> dict[str, Loss]:
    """The loss of every modality on one batch: expand the context, refine the state, and for an objective that needs
    one the target state too. The joint head's is `joint`, over the tokens of its windows.
    """
    feed = move(feed, device)
    batch, state, objective = feed.batch, feed.state, parts.objective
    told = objective.told_target(state.t, state.s)
    target = None
    if objective.needs_target:
        target = Target(state.x_r, state.r, objective.told_target(state.r, state.s))
    attention = plan_batch(batch, "dense") if feed.attention is None else feed.attention
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        hidden, outputs, targets = parts.model(batch, state.x, state.t, told, attention, target)
    asked = batch.labels != NO_LABEL
    losses = {"text": Loss(text_loss(parts.model.logits(hidden[asked]), batch.labels[asked]), asked.sum())}
    head = parts.model.joint_head
    if head is not None and feed.windows is not None:
        tokens = label_windows(batch.labels, head.num_tokens)[feed.windows]
        total = head.training_loss(hidden[feed.windows], tokens, parts.model.vocabulary)
        losses["joint"] = Loss(total, (tokens != NO_LABEL).sum())
    for name, output in outputs.items():
        here = batch.state.modality == list(parts.modalities).index(name)
        if targets is None:
            per_token = objective.token_loss(output, batch.state.values[name], state.noise[name])
            total = torch.where(here, per_token, 0.0).sum()
        else:
            total = _group_losses(objective, batch.state, state, name, output, targets[name])
        losses[name] = Loss(total, here.sum())
    return losses


def _group_losses(
    objective: Objective, stream: Stream, state: NoisyState, name: str, output: Tensor, target: Tensor
) -> Tensor:
    """The sum over a modality's noisy tokens of what each bears of its group's loss; shapes in turn, groups at once."""
    total = output.flatten()[:0].sum()  # of the graph also where there is no group, so that gradients exist
    for shape in state.groups:
        if shape.modality != name:
            continue

        def grouped(tokens: Tensor, slots: Tensor = shape.slots) -> Tensor:
            return tokens.flatten(0, 1)[slots].flatten(2)

        student, other, x_t, x_r = map(grouped, (output, target, state.x[name], state.x_r[name]))
        t, s, r = (time[shape.instance] for time in (state.t, state.s, state.r))
        velocity = None
        if objective.anchored:
            x, noise = grouped(stream.values[name]), grouped(state.noise[name])
            velocity = objective.path.target(x, noise, t[:, None, None])
        loss = objective.group_loss(student, other, x_t, x_r, t, s, r, velocity, shape.same_context)
        total = total + loss.sum() * shape.slots[0].numel()
    return total


def weighted(parts: Parts, losses: Mapping[str, Loss]) -> Tensor:
    """What is minimized: the mean of each modality, and of the joint head, times its weight."""
    weights = {name: modality.loss_weight for name, modality in parts.modalities.items()}
    if parts.joint is not None:
        weights["joint"] = parts.joint.weight
    return torch.stack([weights[name] * loss.mean() for name, loss in losses.items()]).sum()


def train(config: RunConfig, resume: bool = False) -> Path:
    """Trains to `config.train.steps`, or until a signal asks to stop, and returns the last checkpoint.

    Raises ValueError where the run exists and `resume` is not set, or where what is resumed is another run.
    """
    run = Path(config.run)
    latest = _checkpoint_to_resume(run, config, resume)
    device = default_device()
    keep_freed_memory()
    torch.manual_seed(config.seed)
    parts = build(config)
    if config.train.begin_from is not None and latest is None:
        load_checkpoint(find_checkpoint(config.train.begin_from), {"ema": parts.model.state_dict()})
    model = parts.model.to(device, torch.float64 if config.train.precision == "float64" else torch.float32)
    backend = choose_backend(config.train.attention, device)
    if config.train.compile:
        if backend != "dense":
            raise ValueError(
                "train.compile needs train.attention dense: runs have other shapes in every batch"
            )
        model.trunk.compile_blocks()
    ema = Ema(model, config.train.ema_decay)
    optimizer = build_optimizer(model, config.optim)
    loaders = build_loaders(config.data, parts.modalities, config.seed, parts.objective.grouping)
    guard = FiniteGuard(config.train.skip_budget)

    def tensors() -> dict[str, Any]:
        optimizer_tensors = optimizer_state(model, optimizer)
        return {"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer_tensors}

    save_yaml(config, run / CONFIG_NAME)  # not before everything that the configuration names was built
    step = samples = 0
    if latest is not None:
        scalars = load_checkpoint(latest, tensors())
        step, samples, guard.skipped = scalars["step"], scalars["samples"], scalars["skipped"]
        for loader, state in zip(loaders, scalars["loaders"], strict=True):
            loader.load_state(state)
    saved = step if latest is not None else -1

    def save(states: list[dict[str, Any]]) -> Path:
        scalars = {"step": step, "samples": samples, "skipped": guard.skipped, "loaders": states}
        path = save_checkpoint(run / CHECKPOINTS, step, tensors(), scalars)
        prune(run / CHECKPOINTS, config.checkpoint.keep_last, config.checkpoint.milestones)
        return path

    path = latest
    states = [loader.state() for loader in loaders]
    total = config.train.steps
    ready = feeds(
        loaders,
        parts.objective,
        config.seed,
        backend,
        step=step,
        total_steps=total,
        workers=config.train.workers,
        joint=config.joint,
    )
    meters = Meters()
    heard = told = ""
    report = Reporter(
        run, config.log, total_steps=total, step=step, samples=samples, resolved=to_mapping(config)
    )
    with Interrupt() as interrupt, report:
        report.say(_describe(config, parts, backend, device, latest))
        while step < total and not interrupt.requested():
            feed, states = next(ready)
            set_learning_rate(optimizer, lr := learning_rate(config.optim, step, total))
            model.train()
            losses = compute_losses(parts, feed, config.train.precision, device)
            loss = weighted(parts, losses)
            loss.backward()
            norm = clip_grad_norm_(model.parameters(), config.optim.grad_clip or float("inf"))
            if guard.passes(step, loss=loss, grad_norm=norm):
                optimizer.step()
                ema.update(model, step)
            optimizer.zero_grad(set_to_none=True)
            step += 1
            samples += feed.batch.num_documents
            heard = feed.remarks or heard
            for name, part in losses.items():
                meters.add(f"{name}_loss", part.total, part.count)
            meters.add("loss", loss)
            meters.add("grad_norm", norm)
            report.advance(step, samples)
            if step % config.log.every == 0 or step == total:
                if heard != told:  # with the rows, since totals grow with every shard that is read
                    report.say(f"data: {(told := heard)}")
                means = meters.read()
                report.row(step, samples, {"loss": means.pop("loss"), **means, "lr": lr})
            if _due(config.validation.every, step, total):
                with ema.swapped(model):
                    report.row(step, samples, validate(parts, config, device))
            if _due(config.preview.every, step, total) and config.preview.prompts:
                with ema.swapped(model):
                    report.say(f"preview {preview(parts, config, run, step)}")
            if step % config.checkpoint.every == 0:
                path, saved = save(states), step
        if saved != step:
            path = save(states)
        report.say(f"{'finished' if step >= total else 'stopped'} at step {step} of {total}: {path}")
    assert path is not None
    return path


@torch.no_grad()
def validate(parts: Parts, config: RunConfig, device: torch.device) -> dict[str, float]:
    """Mean losses on the held-out sources, with draws that do not depend on the step: schedules are at their end."""
    parts.model.eval()
    data = DataConfig(config.validation.sources, config.data.compose, config.data.pack)
    loaders = build_loaders(data, parts.modalities, config.seed + 1, parts.objective.grouping)
    meters = Meters()
    ready = feeds(
        loaders,
        parts.objective,
        config.seed + 1,
        choose_backend(config.train.attention, device),
        step=1,
        total_steps=1,
        joint=config.joint,
    )
    for feed, _ in islice(ready, config.validation.batches):
        for name, loss in compute_losses(parts, feed, config.train.precision, device).items():
            meters.add(f"validation_{name}_loss", loss.total, loss.count)
    return meters.read()


def preview(parts: Parts, config: RunConfig, run: Path, step: int) -> Path:
    """Draws the preview prompts with each number of steps and writes one grid under the run's `previews`."""
    sampler = Sampler(parts.model, parts.modalities, parts.objective, config.size, config.plan)
    with torch.compiler.set_stance("force_eager"):  # a cache grows: every shape would be compiled anew
        rows = [
            sampler.generate(
                config.preview.prompts, replace(config.plan, steps=steps, guidance=config.preview.guidance)
            ).images
            for steps in config.preview.steps
        ]
    path = run / "previews" / f"step-{step:08d}.png"
    path.parent.mkdir(exist_ok=True)
    labels = [f"{steps} step{'s' if steps > 1 else ''}" for steps in config.preview.steps]
    picture_grid(rows, labels, config.preview.prompts).save(path)
    return path


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


def _describe(
    config: RunConfig, parts: Parts, backend: AttentionBackend, device: torch.device, latest: Path | None
) -> str:
    begin = f"resuming {latest}" if latest is not None else f"training {config.run}"
    return (
        f"{begin}: {parts.model.num_parameters() / 1e6:.2f}M parameters, {config.objective.name}, "
        f"{config.train.precision}, {backend} attention, on {device.type}"
    )
