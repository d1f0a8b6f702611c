"""How fast a sampler draws pictures and writes text on this machine: calls with made-up requests, timed in turns."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from mmgen.sampling.cost import Cost
from mmgen.sampling.plan import Plan
from mmgen.sampling.probes import Probe, timed
from mmgen.sampling.sampler import Result, Sampler


@dataclass(frozen=True)
class SamplingSpeed:
    """What a call took: `num` requests of one plan, drawn together."""

    probe: Probe
    seconds: tuple[float, ...]
    """of each round, from the requests to the finished answers"""
    cost: Cost
    """as the sampler counted it; a text's is of what was written, which may end before the plan's most"""

    @property
    def latency(self) -> float:
        """The median call in seconds: how long each of its requests waits."""
        return float(np.median(self.seconds))

    @property
    def spread(self) -> tuple[float, float]:
        """Between which seconds eight of ten calls were."""
        low, high = np.quantile(self.seconds, [0.1, 0.9]).tolist()
        return low, high

    @property
    def per_second(self) -> float:
        """Pictures a second; tokens a second of a text."""
        made = self.probe.num if self.probe.task == "generate" else self.cost.tokens
        return made / self.latency

    @property
    def flops_per_second(self) -> float:
        """Operations as the sampler counts them, masked keys included; the autoencoder's are in its seconds alone."""
        return self.cost.flops / self.latency


def picture_probes(
    sampler: Sampler, plans: Sequence[Plan], batch_sizes: Sequence[int], prompt_tokens: int
) -> list[Probe]:
    """A call of each plan with each number of requests."""
    return [Probe(sampler, "generate", plan, num, prompt_tokens) for num in batch_sizes for plan in plans]


def text_probes(
    sampler: Sampler, batch_sizes: Sequence[int], prompt_tokens: int, max_tokens: int
) -> list[Probe]:
    """Texts that continue prompts, with one token a pass and, where there is a joint head, as many as it says."""
    head = sampler.model.joint_head
    passes = (1,) if head is None else (1, head.num_tokens)
    plans = [Plan(max_tokens=max_tokens, tokens_per_pass=tokens) for tokens in passes]
    return [Probe(sampler, "complete", plan, num, prompt_tokens) for num in batch_sizes for plan in plans]


def measure_sampling(probes: Sequence[Probe], repeats: int, warmup: int = 1) -> list[SamplingSpeed]:
    """Times the calls in `repeats` rounds of all of them, after `warmup` that are not timed.

    Raises ValueError where the model cannot do what a plan asks.
    """
    if repeats < 1:
        raise ValueError(f"repeats {repeats} must be at least 1")
    costs: dict[Probe, Cost] = {}

    def call(probe: Probe) -> Result:
        result = probe.run()
        costs[probe] = result.cost
        return result

    seconds = timed([partial(call, probe) for probe in probes], repeats, warmup)
    return [
        SamplingSpeed(probe, tuple(own), costs[probe])
        for probe, own in zip(probes, seconds.T.tolist(), strict=True)
    ]
