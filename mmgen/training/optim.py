"""AdamW and Muon with their parameter groups, and the learning rate as a pure function of the step.

Knows parameters by name and shape only; which modules exist is the model's business.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mmgen.training.muon import ShardedMuon

_BLOCK = re.compile(r"(^|\.)layers\.\d+\.")  # parameters of the trunk's blocks


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule."""

    matrices: Literal["adamw", "muon"] = "adamw"
    """What moves the matrices of the trunk's blocks: Muon takes fewer steps; everything else is AdamW's."""
    lr: float = 1e-3
    """Peak learning rate; Muon's updates are scaled to the size of AdamW's, so that one rate serves both."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's first and second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay (times the learning rate), on matrices that `no_decay` does not name."""
    no_decay: tuple[str, ...] = ("embed",)
    """Regular expressions: parameters with a match in their name are not decayed. Vectors never are."""
    rates: Mapping[str, float] = field(default_factory=dict)
    """Regular expression -> factor on the learning rate of parameters with a match in their name; the first match
    counts. 0 freezes them: they take no gradient."""
    warmup_steps: int = 100
    """Steps of linear growth from 0 to the peak."""
    schedule: Literal["constant", "cosine", "wsd"] = "wsd"
    """After the warm-up: constant; a half cosine; or constant, then a linear decay (warm-up, stable, decay)."""
    decay_share: float = 0.2
    """Share of all steps that the last phase of `wsd` takes."""
    final_lr_share: float = 0.0
    """Share of the peak that `cosine` and `wsd` end at."""
    grad_clip: float = 1.0
    """Largest norm of the whole gradient; a larger one is scaled down to it. 0: no clipping."""

    def __post_init__(self) -> None:
        positive = {"lr": self.lr, "eps": self.eps}
        for name, value in positive.items():
            if not value > 0:
                raise ValueError(f"{name} must be above 0, is {value}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be at least 0 and below 1, are {self.betas}")
        for name in ("weight_decay", "warmup_steps", "grad_clip"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, is {getattr(self, name)}")
        for name in ("decay_share", "final_lr_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, is {getattr(self, name)}")
        for name, patterns in (("no_decay", self.no_decay), ("rates", self.rates)):
            for pattern in patterns:
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ValueError(f"{name}: {pattern!r} is no regular expression ({error})") from None
        for pattern, factor in self.rates.items():
            if factor < 0:
                raise ValueError(f"rates.{pattern} must be at least 0, is {factor}")


def learning_rate(config: OptimConfig, step: int, total: int) -> float:
    """Returns the learning rate of optimizer step `step` (the first is 0) of `total`.

    The warm-up begins at 1 / warmup_steps of the peak and a decay reaches `final_lr_share` of it only after the last
    step: no step is wasted on a rate of 0. WSD: arXiv 2404.06395, section 4; its linear decay: arXiv 2405.18392.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "cosine":
        decay_steps = total - config.warmup_steps
    else:
        decay_steps = min(round(config.decay_share * total), total - config.warmup_steps)
    left = total - step
    if left >= decay_steps:
        return config.lr
    share = max(left, 0) / decay_steps
    if config.schedule == "cosine":
        share = (1 - math.cos(math.pi * share)) / 2
    return config.lr * (config.final_lr_share + (1 - config.final_lr_share) * share)


class Together:
    """Several optimizers, each over parameters of its own, that step as one."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> dict[Tensor, Any]:
        return {parameter: state for part in self.parts for parameter, state in part.state.items()}

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)


def freeze(model: nn.Module, config: OptimConfig) -> None:
    """Takes the gradient from parameters whose rate is 0. Raises ValueError for a pattern that matches none."""
    names = [name for name, _ in model.named_parameters()]
    for pattern in config.rates:
        if not any(re.search(pattern, name) for name in names):
            raise ValueError(f"optim.rates: no parameter's name has a match of {pattern!r}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(rate(name, config) > 0)


def build_optimizer(model: nn.Module, config: OptimConfig) -> Together:
    """Returns the optimizer of the parameters that want gradients, with its state made (zeros).

    Muon (torch's own) orthogonalizes the momentum of a matrix; with `match_rms_adamw` (arXiv 2502.16982, section 2.2)
    its updates have the root mean square of AdamW's.

    The state exists from the start, also for parameters that a data mix never reaches, so that every checkpoint of a
    run holds the same tensors. Fused on devices that torch fuses it for. Raises ValueError where nothing is trainable.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise ValueError("the model has no parameter that wants a gradient: nothing to train")

    def groups(names: Iterable[str]) -> list[dict[str, Any]]:
        """One for each rate and decay, in the order in which they come."""
        found: dict[tuple[float, float], list[Tensor]] = {}
        for name in names:
            decay = config.weight_decay if decays(name, named[name], config) else 0.0
            found.setdefault((rate(name, config), decay), []).append(named[name])
        return [
            {"params": params, "rate": factor, "weight_decay": decay, "lr": config.lr * factor}
            for (factor, decay), params in sorted(found.items(), key=lambda item: -item[0][1])
        ]

    muon = [name for name, p in named.items() if config.matrices == "muon" and _is_matrix(name, p)]
    rest = [name for name in named if name not in set(muon)]
    fused = all(p.device.type in ("cpu", "cuda") for p in named.values())
    parts: list[torch.optim.Optimizer] = []
    if rest:
        parts.append(torch.optim.AdamW(groups(rest), betas=config.betas, eps=config.eps, fused=fused))
    if muon:
        sharded = isinstance(named[muon[0]], DTensor)
        parts.append(
            (ShardedMuon if sharded else torch.optim.Muon)(groups(muon), adjust_lr_fn="match_rms_adamw")
        )
    for part in parts:
        _make_state(part)
    return Together(*parts)


def rate(name: str, config: OptimConfig) -> float:
    """Returns the factor on a parameter's learning rate."""
    return next((factor for pattern, factor in config.rates.items() if re.search(pattern, name)), 1.0)


def _is_matrix(name: str, parameter: Tensor) -> bool:
    return parameter.ndim == 2 and _BLOCK.search(name) is not None


def decays(name: str, parameter: Tensor, config: OptimConfig) -> bool:
    """Returns whether weight decay acts on a parameter: matrices that are not embeddings; never norms and biases."""
    return parameter.ndim >= 2 and not any(re.search(pattern, name) for pattern in config.no_decay)


def set_learning_rate(optimizer: torch.optim.Optimizer | Together, lr: float) -> None:
    """Sets the learning rate of every group: `lr` times the group's own rate, where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("rate", 1.0)


def _make_state(optimizer: torch.optim.Optimizer) -> None:
    """Lets the optimizer make its state by a step that changes nothing, then sets the counters back to 0."""
    lrs = [group["lr"] for group in optimizer.param_groups]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    assert all(p.grad is None for p in parameters), "gradients exist already"
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    set_learning_rate(optimizer, 0.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, lr in zip(optimizer.param_groups, lrs, strict=True):
        group["lr"] = lr
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()
