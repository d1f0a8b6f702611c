"""How long one picture takes by each plan: timed in turns, so that what else the machine does falls on all alike."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from mmgen.rng import keyed_numpy
from mmgen.sampling.cost import Cost
from mmgen.sampling.plan import Plan
from mmgen.sampling.request import Request
from mmgen.sampling.sampler import Sampler
from mmgen.sampling.score import score_pictures

WARMUP = 3  # rounds that are not counted: kernels are chosen, and a GPU records what it will replay
ROUNDS = 5


@dataclass(frozen=True)
class Latencies:
    """Seconds of a picture that is drawn alone, decoding included, and of scoring one; medians over the rounds."""

    plans: Mapping[Plan, float]
    scoring: float = 0.0


def measure_latencies(
    sampler: Sampler,
    prompts: Sequence[str],
    plans: Sequence[Plan],
    seed: int,
    scorer: str | None = None,
    on_plan: Callable[[], None] | None = None,
) -> Latencies:
    """Every round takes one prompt and draws it by all plans, in an order of the round's own."""
    found: dict[Plan, list[float]] = {plan: [] for plan in plans}
    scoring: list[float] = []
    for number in range(WARMUP + ROUNDS):
        counted = number >= WARMUP
        prompt = prompts[number % len(prompts)]
        latents = None
        for index in keyed_numpy(seed, "latency", number).permutation(len(plans)):
            started = time.perf_counter()
            latents = sampler.generate([prompt], plans[index], seed).latents
            if counted:
                found[plans[index]].append(time.perf_counter() - started)
            if on_plan is not None:
                on_plan()
        if scorer is not None and latents is not None:
            started = time.perf_counter()
            score_pictures(sampler, scorer, [Request((prompt,))], latents, Cost())
            if counted:
                scoring.append(time.perf_counter() - started)
    seconds = {plan: median(each) for plan, each in found.items()}
    return Latencies(seconds, median(scoring) if scoring else 0.0)
