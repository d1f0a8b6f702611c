"""Timed calls of a sampler, from which `Calibration` is fitted, and against which it is judged.

A probe is a call with made-up requests of a given size: no data set is needed to say how long a plan takes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import PIL.Image
from jaxtyping import Float

from mmgen.rng import keyed_numpy
from mmgen.sampling.calibration import Calibration, Machine
from mmgen.sampling.plan import Plan
from mmgen.sampling.predict import (
    BEGIN,
    Work,
    Written,
    described_tokens,
    predict_pictures,
    predict_texts,
)
from mmgen.sampling.sampler import Result, Sampler


@dataclass(frozen=True)
class Probe:
    """`num` requests: to draw pictures of prompts, to continue prompts, or to describe pictures of noise.

    Pictures are `scale` times as high and wide as the sampler's own.
    """

    sampler: Sampler
    task: Literal["generate", "complete", "describe"]
    plan: Plan
    num: int = 1
    prompt_tokens: int = 6
    scale: int = 1

    @property
    def size(self) -> tuple[int, int]:
        """Of a picture: height and width in pixels."""
        height, width = self.sampler.size
        return self.scale * height, self.scale * width

    def run(self) -> Result:
        return self._run(slice(None))

    @cached_property
    def work(self) -> Work:
        """What the call does. For texts each request is run, alone: that says when it ends, whatever its batch."""
        sampler = self.sampler
        facts = sampler.facts
        tokens = [len(sampler.text.tokenizer.encode(prompt)) for prompt in self._prompts]
        if self.task == "generate":
            return predict_pictures(facts, self.plan, tokens, sampler.image.token_grid(*self.size))
        written = [self._written(index) for index in range(self.num)]
        if self.task == "complete":
            return predict_texts(facts, self.plan, [BEGIN + each for each in tokens], written)
        grid = sampler.image.token_grid(*self.size)
        return predict_texts(
            facts, self.plan, [described_tokens(grid)] * self.num, written, grid[0] * grid[1]
        )

    def _run(self, part: slice) -> Result:
        seed = part.start or 0
        if self.task == "generate":
            return self.sampler.generate(self._prompts[part], self.plan, seed, self.size)
        if self.task == "complete":
            return self.sampler.complete(self._prompts[part], self.plan, seed)
        return self.sampler.describe(self._pictures[part], self.plan, seed)

    def _written(self, index: int) -> Written:
        cost = self._run(slice(index, index + 1)).cost
        kept = min(max(cost.tokens / max(cost.passes, 1), 1), self.plan.tokens_per_pass)
        return Written(cost.tokens, (kept,) * cost.passes)

    @cached_property
    def _prompts(self) -> list[str]:
        tokenizer = self.sampler.text.tokenizer
        plain = sorted(set(range(tokenizer.vocab_size)) - tokenizer.specials)
        draw = keyed_numpy("probe", self.num, self.prompt_tokens)
        return [tokenizer.decode(draw.choice(plain, self.prompt_tokens).tolist()) for _ in range(self.num)]

    @cached_property
    def _pictures(self) -> list[PIL.Image.Image]:
        pixels = keyed_numpy("probe", self.num).integers(256, size=(self.num, *self.size, 3))
        return [PIL.Image.fromarray(each) for each in pixels.astype(np.uint8)]


def default_probes(sampler: Sampler, batch_sizes: Sequence[int] = (1, 8, 64)) -> list[Probe]:
    """Calls that tell the features of `calibration.features` apart, with batches up to the largest that will be asked.

    Raises ValueError for fewer than two sizes, which cannot tell what a request takes from what a call takes.
    """
    if len(set(batch_sizes)) < 2:
        raise ValueError(f"batch_sizes {tuple(batch_sizes)} must be two different numbers or more")
    probes = []
    if "image" in sampler.modalities:
        height, width = sampler.image.token_grid(*sampler.size)
        plans = [Plan(steps=1), Plan(steps=8), Plan(steps=2, guidance=2.0)]
        plans += [Plan(blocks=blocks, steps=2) for blocks in sorted({min(2, height), height} - {1})]
        probes += [Probe(sampler, "generate", plan, num) for num in batch_sizes for plan in plans]
        probes += [Probe(sampler, "generate", Plan(steps=1), num, prompt_tokens=24) for num in batch_sizes]
        for num in batch_sizes[:2]:
            probes += [Probe(sampler, "describe", Plan(max_tokens=tokens), num) for tokens in (1, 16)]
            if 2 * max(height, width) <= sampler.text.tokenizer.max_size:
                # keys grow with a picture, and nothing else that a token costs does
                probes.append(Probe(sampler, "generate", Plan(steps=2), num, scale=2))
    head = sampler.model.joint_head
    for num in batch_sizes:
        for k in {1} | ({2, head.num_tokens} if head else set()):
            plans = [Plan(max_tokens=tokens, tokens_per_pass=k) for tokens in (4, 24)]
            probes += [Probe(sampler, "complete", plan, num) for plan in plans]
        probes.append(Probe(sampler, "complete", Plan(max_tokens=4), num, prompt_tokens=24))
    return probes


def timed(calls: Sequence[Callable[[], Result]], repeats: int, warmup: int = 1) -> Float[np.ndarray, "R C"]:
    """The seconds of each call in each of `repeats` rounds, after `warmup` that are not timed.

    Rounds are of all calls, so that a machine that is slow for a while is so to one round of each.
    """
    return np.array([[call().cost.seconds for call in calls] for _ in range(repeats + warmup)])[warmup:]


def fastest(calls: Sequence[Callable[[], Result]], repeats: int) -> list[float]:
    """The least seconds of each call over `timed` rounds: what other programs do on the machine only ever adds time."""
    return timed(calls, repeats).min(axis=0).tolist()


def calibrate(sampler: Sampler, batch_sizes: Sequence[int] = (1, 8, 64), repeats: int = 5) -> Calibration:
    """A calibration of this sampler's model here and now; takes as long as `default_probes` do, repeats + 2 times."""
    probes = default_probes(sampler, batch_sizes)
    seconds = fastest([probe.run for probe in probes], repeats)
    device = sampler.model.text_embedding.weight.device
    return Calibration.fit(Machine.here(device), [probe.work for probe in probes], seconds)
