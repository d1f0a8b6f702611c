"""Batches made ready ahead of the step, in processes beside it: packing, noise and the attention's plan.

Everything here is a pure function of the loaders' states and the seed, so where it runs changes nothing.
"""

import signal
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from multiprocessing import active_children
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mmgen.data.loader import Counts, Loader, count_treated
from mmgen.model.attention import AttentionBackend
from mmgen.model.joint import JointConfig
from mmgen.model.model import BatchAttention, plan_batch
from mmgen.objectives import Objective
from mmgen.objectives.draw import NoisyState, draw_state
from mmgen.rng import keyed_numpy
from mmgen.sequence import NO_LABEL, PackedBatch
from mmgen.training.flops import Work

PREFETCH = 3


@dataclass(frozen=True)
class Feed:
    """One batch as a step takes it."""

    batch: PackedBatch
    state: NoisyState
    attention: BatchAttention | None
    """None for dense: its masks are larger than the layouts they are made of, so they are made where the step is"""
    windows: Bool[Tensor, "B C"] | None = None
    """context tokens at which a joint head is trained; None where there is no such head"""
    work: Work | None = None
    """what it asks of the network, counted where it was made; None where nobody did"""
    treated: Counts = field(default_factory=Counter)
    """what the rank's loaders have met so far, in all processes that make batches for it"""


@dataclass(frozen=True)
class Part:
    """Which batches are a rank's own: of the `micro_batches` of every step those rank, rank + num_ranks, ...

    Batches are numbered over the whole training, so that which there are depends on no rank. Raises ValueError where
    the ranks cannot share them evenly.
    """

    micro_batches: int = 1
    rank: int = 0
    num_ranks: int = 1

    def __post_init__(self) -> None:
        if self.micro_batches % self.num_ranks:
            raise ValueError(
                f"train.micro_batches {self.micro_batches} must be a multiple of the {self.num_ranks} ranks: "
                "each takes as many of a step's batches"
            )

    def check_streams(self, streams: int, workers: int) -> None:
        """Raises ValueError where a stream of the data would not be one process's alone."""
        makers = self.num_ranks * max(workers, 1)
        if streams % makers:
            ranks = f"{self.num_ranks} ranks x " if self.num_ranks > 1 else ""
            raise ValueError(
                f"data.streams {streams} must be a multiple of {makers} ({ranks}train.workers {workers}): "
                "each stream is one process's"
            )

    @property
    def num_own(self) -> int:
        """Batches of a step that are the rank's."""
        return self.micro_batches // self.num_ranks

    def own_streams(self, streams: int) -> range:
        return range(self.rank, streams, self.num_ranks)


@dataclass(eq=False)
class _Feeds(IterableDataset):
    loaders: Sequence[Loader]
    objective: Objective
    seed: int
    backend: AttentionBackend
    step: int
    total_steps: int
    joint: JointConfig | None
    part: Part

    def __iter__(self) -> Generator[tuple[Feed, int, dict[str, Any], int] | ValueError, None, None]:
        """Every so many of the rank's batches as there are workers; also the stream, its state after the batch, and
        the worker."""
        worker, part = get_worker_info(), self.part
        first, stride = (0, 1) if worker is None else (worker.id, worker.num_workers)
        batches = [iter(loader) for loader in self.loaders]
        begin = self.step * part.micro_batches + part.rank
        try:
            for number in count(begin + first * part.num_ranks, stride * part.num_ranks):
                stream = number % len(self.loaders)
                loader, (batch, state) = self.loaders[stream], next(batches[stream])
                # batches made ahead of the last step are never used, but they are made
                fraction = min(number // part.micro_batches / self.total_steps, 1.0)
                drawn = draw_state(batch, loader.modalities, self.objective, self.seed, fraction)
                feed = make_feed(batch, drawn, self.backend, self.joint, self.seed, number)
                yield replace(feed, treated=count_treated(self.loaders)), stream, state, first
        except ValueError as error:
            yield error  # handed over whole: torch would wrap it in the worker's traceback


def feeds(
    loaders: Sequence[Loader],
    objective: Objective,
    seed: int,
    backend: AttentionBackend,
    *,
    step: int,
    total_steps: int,
    workers: int = 0,
    joint: JointConfig | None = None,
    part: Part = Part(),
) -> Generator[tuple[Feed, list[dict[str, Any]]], None, None]:
    """(batch ready for its step, the states of all loaders after it), without end; made by so many processes beside
    this one, or in it, until it is closed. The batches and the streams are those of `part`; the states of others'
    streams stay as they are.

    The first batch is of `step` (counted from 0) of `total_steps`, on which an objective's schedule may depend.
    Raises ValueError where a loader does: no usable sample, or too many broken ones.
    """
    part.check_streams(len(loaders), workers)
    states = [loader.state() for loader in loaders]
    own = _Feeds(loaders, objective, seed, backend, step, total_steps, joint, part)
    items = _ahead(own, workers) if workers else iter(own)
    treated: dict[int, Counts] = {}
    with closing(items):
        for item in items:
            if isinstance(item, ValueError):
                raise item
            feed, stream, states[stream], worker = item
            treated[worker] = feed.treated
            yield replace(feed, treated=sum(treated.values(), Counter())), list(states)


@contextmanager
def worker_deaths() -> Iterator[None]:
    """Raises OSError where the system ends a worker. Torch's signal handler has a RuntimeError for it, which comes up
    wherever this process is."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        raise OSError(
            f"a process that makes batches was ended by the system, often for want of memory: {error} "
            "Fewer train.workers or a smaller cache_mb take less."
        ) from None


def make_feed(
    batch: PackedBatch,
    drawn: NoisyState,
    backend: AttentionBackend,
    joint: JointConfig | None,
    seed: int,
    number: int,
) -> Feed:
    """Batch `number` of the training with its noisy state: the attention planned, a joint head's windows drawn, and
    its work counted."""
    windows = None if joint is None else draw_windows(batch, joint.share, seed, number)
    plan = None if backend == "dense" else plan_batch(batch, backend)
    return Feed(batch, drawn, plan, windows, Work.attended(batch, windows))


def _ahead(items: _Feeds, workers: int) -> Generator[Any, None, None]:
    """The items of so many processes in turn, which end with this generator. Each is received by a thread during the
    step before: hundreds of small tensors come with a batch.
    """
    beside = {"num_workers": workers, "prefetch_factor": PREFETCH, "worker_init_fn": _begin_worker}
    others = active_children()
    source = iter(DataLoader(items, batch_size=None, **beside))
    own = [child for child in active_children() if child not in others]
    try:
        with ThreadPoolExecutor(1, "feed") as thread:
            coming = thread.submit(next, source)
            while True:
                item = coming.result()
                coming = thread.submit(next, source)
                yield item
    finally:
        # Torch asks them to end, waits, and at last sends SIGTERM, which they do not hear: one that is long at a batch
        # would be waited for without end when this process exits. It is called by name, since whoever holds the
        # traceback of an error holds `source` too.
        getattr(source, "_shutdown_workers", lambda: None)()
        for worker in own:
            worker.kill()


def draw_windows(batch: PackedBatch, share: float, seed: int, number: int) -> Bool[Tensor, "B C"]:
    """A share of the context tokens that text follows, drawn anew for each batch."""
    uniform = torch.from_numpy(keyed_numpy(seed, "windows", number).random(batch.labels.shape))
    return (batch.labels != NO_LABEL) & (uniform < share)


def _begin_worker(_: int) -> None:
    # Ctrl-C, and SIGTERM from most schedulers, reach every process of the group; the trainer alone decides when to
    # stop, and its worker ends with it (torch's worker loop watches its parent).
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
