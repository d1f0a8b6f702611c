"""What several tokens a pass buy on text: tokens that a pass keeps, tokens a second, operations a token.

Verified drafts have the trunk's law, so quality is one number for all rows (bits per byte), unlike on the surface of
pictures. Loads no run, prints nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import PIL.Image
import torch

from mmgen.evaluation.intervals import Estimate, spread
from mmgen.evaluation.text import bits_per_byte
from mmgen.sampling.plan import Plan
from mmgen.sampling.sampler import Result, Sampler

MAX_TEXTS = 64
GIVEN_TOKENS = 2  # of a caption that is continued
REPEATS = 5


@dataclass(frozen=True)
class TextSource:
    """What is written: a text about each picture, or the rest of each caption."""

    name: str
    pictures: Sequence[PIL.Image.Image] = ()
    captions: Sequence[str] = ()

    def write(self, sampler: Sampler, plan: Plan, seed: int) -> Result:
        if self.pictures:
            return sampler.describe(self.pictures, plan, seed)
        tokenizer = sampler.text.tokenizer
        prompts = [tokenizer.decode(tokenizer.encode(text)[:GIVEN_TOKENS]) for text in self.captions]
        return sampler.complete(prompts, plan, seed)


def describes(tasks: Sequence[str]) -> bool:
    """Whether a model of these tasks has learned to say what a picture shows: a text comes after one."""
    orders = [[part.partition(":")[0] for part in task.split()] for task in tasks]
    return any(order[i : i + 2] == ["image", "text"] for order in orders for i in range(len(order)))


def sources_of(
    tasks: Sequence[str], pictures: Sequence[PIL.Image.Image], captions: Sequence[str]
) -> list[TextSource]:
    """Those that the tasks of a run train: captions, and pictures where a text follows one."""
    found = [TextSource("captions", captions=captions[:MAX_TEXTS])]
    return [TextSource("pictures", pictures=pictures[:MAX_TEXTS]), *found] if describes(tasks) else found


def tokens_a_pass(sampler: Sampler) -> list[int]:
    """1, 2, 4, ... as far as the model's joint head says so many."""
    head = sampler.model.joint_head
    most = 1 if head is None else head.num_tokens
    return [2**i for i in range(most.bit_length())]


def text_surface(
    sampler: Sampler,
    sources: Sequence[TextSource],
    captions: Sequence[str],
    seed: int,
    on_pass: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """One row for each source and number of tokens a pass.

    Numbers of tokens take turns, with a seed for each turn, so that what slows the machine slows all. `kept` is over
    autoregression's tokens a pass, which are not 1: a text's first token needs no pass. Intervals are over turns. A
    source has no row where the model ends all of its texts before the first token.
    """
    if not captions:
        return []
    nats, num_bytes = sampler.bits(captions)
    bits = bits_per_byte(torch.from_numpy(nats), torch.from_numpy(num_bytes), ("tradeoff", "text"))
    rows = []
    for source in sources:
        plans = {k: replace(sampler.plan, tokens_per_pass=k) for k in tokens_a_pass(sampler)}
        for plan in plans.values():
            source.write(sampler, plan, seed)  # warm-up
        kept: dict[int, list[float]] = {k: [] for k in plans}
        speed: dict[int, list[float]] = {k: [] for k in plans}
        flops: dict[int, list[float]] = {k: [] for k in plans}
        for turn in range(REPEATS):
            for k, plan in plans.items():
                cost = source.write(sampler, plan, seed + (turn + 1) * MAX_TEXTS).cost
                kept[k].append(cost.tokens / max(cost.passes, 1))
                speed[k].append(cost.tokens / cost.seconds)
                flops[k].append(cost.flops / max(cost.tokens, 1))
                on_pass()
        if min(map(min, kept.values())) == 0:
            continue
        for k, plan in plans.items():
            num = len(source.pictures or source.captions)
            ratios = [mine / one for mine, one in zip(kept[k], kept[1], strict=True)]
            rows.append(
                {
                    "source": source.name,
                    "tokens_per_pass": k,
                    "temperature": plan.temperature,
                    "kept": spread(ratios, num),
                    "tokens_per_second": spread(speed[k], num),
                    "speed": spread([a / b for a, b in zip(speed[k], speed[1], strict=True)], num),
                    "flops_per_token": sum(flops[k]) / REPEATS,
                    "bits_per_byte": bits,
                }
            )
    return rows


def plain(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows as JSON has them."""
    return [
        {name: vars(value) if isinstance(value, Estimate) else value for name, value in row.items()}
        for row in rows
    ]
