"""How fast a configuration trains on this machine: some of its own steps, timed. Nothing is written.

Steps are those of training (`Stepper`), on batches of its data, or on made-up ones of the same size. Losses go to no
file, and nothing is validated, previewed or saved.
"""

import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from torch.profiler import record_function

from mmgen.data.loader import build_loaders
from mmgen.sampling.calibration import Machine
from mmgen.training.feed import Feed, Part, feeds
from mmgen.training.host import keep_freed_memory
from mmgen.training.metrics import known_peak, memory_gb
from mmgen.training.ranks import Ranks, joined
from mmgen.training.run import RunConfig, build
from mmgen.training.step import Stepper
from mmgen.training.synthetic import full_feed

MOST_IN_PARTS = 5  # steps, after those that are timed whole


@dataclass(frozen=True)
class TrainingSpeed:
    """What was timed, on the first rank; seconds unless it says otherwise."""

    what: str
    """model, objective, precision, attention and devices, in one line"""
    machine: Machine
    num_ranks: int
    steps: tuple[float, ...]
    """each step, its wait for batches included"""
    waits: tuple[float, ...]
    """for batches, of each step"""
    parts: dict[str, float]
    """of a step by name: means over further steps, in which the device was waited for after each part; `other` is the
    rest of those steps"""
    seen: dict[str, int]
    """samples, tokens of both streams and pictures that the timed steps trained on, over all ranks"""
    flops: float
    """operations a step, of this rank: attended pairs, none counted twice"""
    peak: float | None
    """operations a second of the device, where its datasheet is known"""
    memory_gb: float
    """the most that was in use: of the GPU, or of this process where there is none"""

    @property
    def step(self) -> float:
        """The median step."""
        return median(self.steps)

    @property
    def spread(self) -> tuple[float, float]:
        """Between which eight of ten steps were."""
        low, high = np.quantile(self.steps, [0.1, 0.9]).tolist()
        return low, high

    @property
    def per_second(self) -> dict[str, float]:
        """Of each of `seen`, over all timed steps."""
        return {name: count / sum(self.steps) for name, count in self.seen.items()}

    @property
    def data_wait(self) -> float:
        """The share of the time that went by without a batch."""
        return sum(self.waits) / sum(self.steps)

    @property
    def flops_per_second(self) -> float:
        return self.flops * len(self.steps) / sum(self.steps)

    @property
    def mfu(self) -> float | None:
        return None if self.peak is None else self.flops_per_second / self.peak


def measure_training(
    config: RunConfig, steps: int = 20, warmup: int = 5, synthetic: bool = False
) -> TrainingSpeed | None:
    """Times `steps` steps of a fresh model after `warmup` others, then a few in parts; None on ranks but the first.

    `synthetic`: on full rows of made-up documents, so that neither data, tokenizer nor autoencoder need be there. Under
    torchrun all its processes train together. Raises ValueError where the configuration cannot be trained, and
    FloatingPointError where a step's loss or gradient is not finite.
    """
    if steps < 1 or warmup < 0:
        raise ValueError(f"steps {steps} must be at least 1, warmup {warmup} at least 0")
    with joined() as ranks:
        found = _measure(config, steps, warmup, synthetic, ranks)
        return found if ranks.rank == 0 else None


def _measure(config: RunConfig, steps: int, warmup: int, synthetic: bool, ranks: Ranks) -> TrainingSpeed:
    part = Part(config.train.micro_batches, ranks.rank, ranks.num_ranks)
    if not synthetic:
        part.check_streams(config.data.streams, config.train.workers)
    keep_freed_memory()
    torch.manual_seed(config.seed)
    stepper = Stepper(config, build(config, outline=synthetic), ranks)
    clock = _Clock(ranks.device)
    with closing(_synthetic(stepper, part) if synthetic else _real(stepper, part)) as batches:
        _steps(stepper, batches, range(warmup))
        timed = _steps(stepper, batches, range(warmup, warmup + steps))
        in_parts = range(warmup + steps, warmup + steps + min(steps, MOST_IN_PARTS))
        last = _steps(stepper, batches, in_parts, clock)
    named = {"data": sum(step.wait for step in last), **clock.seconds}
    named["other"] = sum(step.seconds for step in last) - sum(named.values())
    seen = sum((step.seen for step in timed), Counter[str]())
    return TrainingSpeed(
        stepper.describe(),
        Machine.here(ranks.device),
        ranks.num_ranks,
        tuple(step.seconds for step in timed),
        tuple(step.wait for step in timed),
        {name: seconds / len(last) for name, seconds in named.items()},
        dict(seen),
        fmean(step.flops for step in timed),
        known_peak(ranks.device),
        memory_gb(),
    )


@dataclass(frozen=True)
class _Step:
    seconds: float
    wait: float
    seen: Counter[str]
    flops: float


def _steps(
    stepper: Stepper,
    batches: Iterator[list[Feed]],
    numbers: Sequence[int],
    part: Callable[[str], AbstractContextManager[Any]] = record_function,
) -> list[_Step]:
    """Takes steps one after the other, as training does: the device is waited for only at both ends of them all."""
    found = []
    _wait_for(stepper.ranks.device)
    begin = time.perf_counter()
    for number in numbers:
        feeds = next(batches)
        ready = time.perf_counter()
        flops = stepper.flops(feeds)
        taken = stepper.take(number, feeds, part)
        if not taken.finite:
            raise FloatingPointError(
                f"step {number + 1} would be left out, its loss ({taken.whole:.4g}) or gradient is not finite: "
                "what it takes says nothing"
            )
        if number == numbers[-1]:
            _wait_for(stepper.ranks.device)
        end = time.perf_counter()
        found.append(_Step(end - begin, ready - begin, taken.seen, flops))
        begin = end
    return found


class _Clock:
    """Seconds within named parts, the device waited for before and after each."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        _wait_for(self.device)
        begin = time.perf_counter()
        yield
        _wait_for(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin


def _wait_for(device: torch.device) -> None:
    """Returns once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _real(stepper: Stepper, part: Part) -> Generator[list[Feed], None, None]:
    """The batches of each step, of the configuration's data."""
    config, parts = stepper.config, stepper.parts
    ready = feeds(
        build_loaders(config.data, parts.modalities, config.seed, parts.objective.grouping),
        parts.objective,
        config.seed,
        stepper.attention.backend,
        step=0,
        total_steps=config.train.steps,
        workers=config.train.workers,
        joint=config.joint,
        part=part,
    )
    with closing(ready):
        while True:
            yield [next(ready)[0] for _ in range(part.num_own)]


def _synthetic(stepper: Stepper, part: Part) -> Generator[list[Feed], None, None]:
    """The same made-up batch for all: its tokens decide no time."""
    feed = full_feed(stepper.config, stepper.parts, stepper.attention.backend, part.rank)
    while True:
        yield [feed] * part.num_own
