"""Batches made ready ahead of the step, in a process beside it: packing, noise and the attention's plan.

Everything here is a pure function of the loader's state and the seed, so where it runs changes nothing.
"""

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from mmgen.data.loader import Loader
from mmgen.model.attention import AttentionBackend
from mmgen.model.joint import JointConfig
from mmgen.model.model import BatchAttention, plan_batch
from mmgen.objectives import Objective
from mmgen.objectives.draw import NoisyState, draw_state
from mmgen.rng import keyed_numpy
from mmgen.sequence import NO_LABEL, PackedBatch

PREFETCH = 3


@dataclass(frozen=True)
class Feed:
    """One batch as a step takes it."""

    batch: PackedBatch
    state: NoisyState
    attention: BatchAttention
    remarks: str
    """what the loader says of its samples so far"""
    windows: Bool[Tensor, "B C"] | None = None
    """context tokens at which a joint head is trained; None where there is no such head"""


@dataclass(eq=False)
class _Feeds(IterableDataset):
    loader: Loader
    objective: Objective
    seed: int
    backend: AttentionBackend
    step: int
    total_steps: int
    joint: JointConfig | None

    def __iter__(self) -> Iterator[tuple[Feed, dict[str, Any]] | ValueError]:
        try:
            for step, (batch, state) in enumerate(self.loader, self.step):
                # batches made ahead of the last step are never used, but they are made
                fraction = min(step / self.total_steps, 1.0)
                drawn = draw_state(batch, self.loader.modalities, self.objective, self.seed, fraction)
                windows = None
                if self.joint is not None:
                    windows = draw_windows(batch, self.joint.share, self.seed, step)
                plan = plan_batch(batch, self.backend)
                yield Feed(batch, drawn, plan, self.loader.remarks(), windows), state
        except ValueError as error:
            yield error  # handed over whole: torch would wrap it in the worker's traceback


def feeds(
    loader: Loader,
    objective: Objective,
    seed: int,
    backend: AttentionBackend,
    *,
    step: int,
    total_steps: int,
    ahead: bool,
    joint: JointConfig | None = None,
) -> Iterator[tuple[Feed, dict[str, Any]]]:
    """(batch ready for its step, the loader's state after it), without end; made in another process if `ahead`.

    The first batch is that of `step` (counted from 0) of `total_steps`, on which an objective's schedule may depend.
    Raises ValueError where the loader does: no usable sample, or too many broken ones.
    """
    items: Any = _Feeds(loader, objective, seed, backend, step, total_steps, joint)
    if ahead:
        workers = {"num_workers": 1, "prefetch_factor": PREFETCH, "worker_init_fn": _begin_worker}
        items = DataLoader(items, batch_size=None, **workers)
    for item in items:
        if isinstance(item, ValueError):
            raise item
        yield item


def draw_windows(batch: PackedBatch, share: float, seed: int, step: int) -> Bool[Tensor, "B C"]:
    """A share of the context tokens that text follows, drawn anew at each step."""
    uniform = torch.from_numpy(keyed_numpy(seed, "windows", step).random(batch.labels.shape))
    return (batch.labels != NO_LABEL) & (uniform < share)


def _begin_worker(_: int) -> None:
    # Ctrl-C, and SIGTERM from most schedulers, reach every process of the group; the trainer alone decides when to
    # stop, and its worker ends with it (torch's worker loop watches its parent).
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
