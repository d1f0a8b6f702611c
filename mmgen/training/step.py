"""An optimizer step, and what it needs of a run: the model as it is trained, its averages, the optimizer.

Training takes its steps here, and `mmgen bench train` times the same ones.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_
from torch.profiler import record_function

from mmgen.model.attention import AttentionBackend, choose_backend
from mmgen.model.model import Model
from mmgen.model.precision import float32_products
from mmgen.sampling.predict import ModelFacts
from mmgen.training.checkpoint import optimizer_state
from mmgen.training.ema import Ema
from mmgen.training.feed import Feed
from mmgen.training.flops import Work, step_flops
from mmgen.training.guards import FiniteGuard
from mmgen.training.losses import Loss, compute_losses, seen_in, token_counts, weighted
from mmgen.training.optim import build_optimizer, freeze, learning_rate, set_learning_rate
from mmgen.training.parallel import build_mesh, shard
from mmgen.training.ranks import Ranks, summed, total
from mmgen.training.run import Parts, RunConfig
from mmgen.training.spikes import Tally, tally


@dataclass(frozen=True)
class Taken:
    """What a step came to."""

    finite: bool
    """whether loss and gradient are, on every rank; else the weights are what they were"""
    loss: Tensor
    """this rank's share of the loss"""
    whole: float
    """the loss: the sum of all ranks' shares"""
    grad_norm: Tensor
    lr: float
    seen: Counter[str]
    """what a run counts (`seen_in`), of all ranks' batches"""
    losses: list[dict[str, Loss]]
    """of each of this rank's batches, without gradient"""
    cells: Tally
    """the same by source and time"""


class Stepper:
    """A run's model, averages and optimizer on this rank, and the step that changes them.

    Raises ValueError where the configuration cannot be trained so: an attention that cannot compute here or cannot be
    compiled, or copies that do not divide the ranks.
    """

    def __init__(self, config: RunConfig, parts: Parts, ranks: Ranks) -> None:
        self.config, self.parts, self.ranks = config, parts, ranks
        train, head_dim = config.train, config.model.head_dim
        self.attention = choose_backend(train.attention, ranks.device, head_dim, train.precision)
        self.model = _prepare(parts, config, self.attention.backend, ranks)
        self.emas = {name: Ema(self.model, decay) for name, decay in config.train.averages().items()}
        self.optimizer = build_optimizer(self.model, config.optim)
        self.guard = FiniteGuard(config.train.skip_budget)
        self.facts = ModelFacts.of(parts.model, parts.modalities, parts.objective)

    def describe(self) -> str:
        """What is trained, how and where, in one line."""
        train, ranks = self.config.train, self.ranks
        where = f"{ranks.num_ranks} x {ranks.device.type}" if ranks.num_ranks > 1 else ranks.device.type
        return (
            f"{self.parts.model.num_parameters() / 1e6:.2f}M parameters, {self.config.objective.name}, "
            f"{train.precision}, {self.attention.backend} attention ({self.attention.why}), on {where}"
        )

    def tensors(self) -> dict[str, Any]:
        """What a checkpoint holds, by section."""
        averages = {name: ema.state_dict() for name, ema in self.emas.items()}
        optimizer = optimizer_state(self.model, self.optimizer)
        return {"model": self.model.state_dict(), **averages, "optimizer": optimizer}

    def flops(self, feeds: Sequence[Feed]) -> float:
        """Operations of a step on these batches: real tokens and the pairs that the mask allows, none twice."""
        works = (feed.work or Work.attended(feed.batch, feed.windows) for feed in feeds)
        target = self.parts.objective.needs_target
        return sum(step_flops(self.facts, each, target).total for each in works)

    def take(
        self,
        step: int,
        feeds: Sequence[Feed],
        part: Callable[[str], AbstractContextManager[Any]] = record_function,
    ) -> Taken:
        """Step number `step` (counted from 0) on this rank's batches; every rank must take it.

        Its parts (forward, with the losses; backward; optimizer) are done within `part(name)`: by default a trace of
        torch's profiler has them by name. Where loss or gradient is not finite the weights are left as they were.
        """
        config, parts, ranks = self.config, self.parts, self.ranks
        of_step, seen = self._counts(feeds)
        # of float32 the trunk leaves times' products and the heads', which are exact anyway, and the vocabulary's
        tensor_cores = config.train.precision == "bf16" and ranks.device.type == "cuda"
        products = partial(float32_products, "high") if tensor_cores else nullcontext
        set_learning_rate(self.optimizer, lr := learning_rate(config.optim, step, config.train.steps))
        self.model.train()
        loss, found = torch.zeros((), device=ranks.device), []
        for number, feed in enumerate(feeds, 1):
            if isinstance(self.model, FSDPModule):  # copies exchange what a rank's batches add up to
                self.model.set_requires_all_reduce(number == len(feeds))
            with part("forward"), products():
                losses = compute_losses(parts, feed, config.train.precision, ranks.device)
                share = weighted(parts, losses, of_step)
            with part("backward"), products():
                (share * ranks.num_ranks).backward()  # since gradients are averaged over ranks
            loss = loss + share.detach()
            found.append({name: replace(each, total=each.total.detach()) for name, each in losses.items()})
        with part("optimizer"):
            norm = clip_grad_norm_(self.model.parameters(), config.optim.grad_clip or float("inf"))
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            finite = self.guard.passes(step + 1, loss=loss, grad_norm=norm)
            if finite:
                self.optimizer.step()
                for ema in self.emas.values():
                    ema.update(self.model, step)
            self.optimizer.zero_grad(set_to_none=True)
        return Taken(finite, loss, total(loss), norm, lr, seen, found, tally(feeds, found))

    def _counts(self, feeds: Sequence[Feed]) -> tuple[Mapping[str, int], Counter[str]]:
        """Tokens that each loss of the whole step is summed over, so that a batch with few of a kind weighs no more by
        it; and what the run counts of it."""
        tokens, seen = Counter[str](), Counter[str]()
        for feed in feeds:
            tokens.update(token_counts(self.parts, feed))
            seen.update(seen_in(feed.batch))
        tokens, seen = summed(tokens, seen)
        return tokens, seen


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
