"""The surface: what quality each unit of inference compute buys, over blocks, steps and guidance of one model.

Every plan draws one picture for each of the same prompts, with the same noise, and is judged picture by picture. What
is chosen (the guidance of each number of blocks and steps) is chosen on one half of the prompts and reported on the
other: a plan that was lucky on the one is not on the other. Loads no run, prints nothing and writes nothing.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

from mmgen.data.streams import SourceConfig
from mmgen.evaluation.alignment import nearest, retrieves_concept
from mmgen.evaluation.distances import kid, kid_value, real_floor
from mmgen.evaluation.evaluate import SEED_STRIDE, encode
from mmgen.evaluation.features import Lite0Features, picture_features
from mmgen.evaluation.intervals import Estimate, proportion
from mmgen.evaluation.memorization import MIN_HELD_OUT, QUANTILE, nearest_distances
from mmgen.evaluation.real import SEEN, RealPicture, read_split, real_pictures, splits_of
from mmgen.rng import keyed_numpy
from mmgen.sampling.plan import Plan
from mmgen.sampling.sampler import Sampler

HITS = ("own_latent", "own_lite0", "concept_lite0", "copies_lite0")
AXES = ("blocks", "steps", "guidance")
# what people are shown of a figure
FIGURES = {
    "kid_lite0": "KID-lite0",
    "own_latent": "own nearest, latents",
    "own_lite0": "own nearest, lite0",
    "concept_lite0": "concept nearest",
    "copies_lite0": "copies",
}


@dataclass(frozen=True)
class TradeoffConfig:
    """Which plans are measured, and on how many prompts of which split (none: the first held-out one)."""

    blocks: tuple[int, ...] = (1,)
    steps: tuple[int, ...] = (1, 2, 4, 8)
    guidance: tuple[float, ...] = (1.0, 2.0, 3.0)
    num: int = 200
    split: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in AXES:
            if not getattr(self, name):
                raise ValueError(f"{name} must name one value or more")
        if self.num < 8:
            raise ValueError(
                f"num {self.num} must be at least 8: a distance on each half takes four pictures"
            )

    def plans(self, base: Plan) -> list[Plan]:
        """Every combination, cheap ones first."""
        combinations = product(self.blocks, self.steps, self.guidance)
        made = [replace(base, blocks=b, steps=s, guidance=g) for b, s, g in combinations]
        return sorted(made, key=lambda plan: (plan.blocks * sum(plan.block_steps), plan.guidance != 1))


@dataclass(frozen=True)
class Measured:
    """Pictures of one plan: features, whether each hits (see `Judge`), and what one picture cost.

    hits: own_latent, own_lite0: the nearest of the prompts' real pictures is its own. concept_lite0: the nearest real
    picture of another style shows its concept. copies_lite0: nearer to a training picture than 95 % of held-out ones
    are (absent where there are too few of those).
    """

    plan: Plan
    features: Float[Tensor, "N F"]
    hits: Mapping[str, Bool[Tensor, "N"]]
    nfe: int
    flops: float
    seconds: float


class Judge:
    """The real side of a surface: prompts, their pictures in features and latents, and the halves of the prompts."""

    def __init__(self, sampler: Sampler, sources: Mapping[str, SourceConfig], config: TradeoffConfig) -> None:
        there = splits_of(sources)
        self.split = config.split or next((split for split in there if split != SEEN), SEEN)
        if self.split not in there:
            raise ValueError(f"the data has no split {self.split!r}, only {', '.join(there)}")
        self.lite0 = Lite0Features()
        pictures = {split: self._pictures(sampler, sources, split) for split in there}
        self.chosen = pictures[self.split][: config.num]
        if len(self.chosen) < 8:
            raise ValueError(
                f"the split {self.split!r} has {len(self.chosen)} captioned pictures, at least 8 are needed"
            )
        gallery = [SEEN] if self.split == SEEN else [SEEN, self.split]
        self.gallery = [real for name in gallery for real in pictures[name]]
        features = {name: self._features(members) for name, members in pictures.items()}
        self.gallery_features = torch.cat([features[name] for name in gallery])
        self.features = features[self.split][: len(self.chosen)]
        self.latents = encode([real.picture for real in self.chosen], sampler).flatten(1)
        self.training = features[SEEN]
        held_out = [name for name in there if name != SEEN] if self.split == SEEN else [self.split]
        reference = torch.cat([features[name] for name in held_out])
        self.threshold = None
        if len(reference) >= MIN_HELD_OUT:
            self.threshold = nearest_distances(reference, self.training).quantile(QUANTILE)

    @property
    def prompts(self) -> list[str]:
        return [real.prompt for real in self.chosen]

    def _pictures(
        self, sampler: Sampler, sources: Mapping[str, SourceConfig], split: str
    ) -> list[RealPicture]:
        samples = [sample for source in sources.values() for sample in read_split(source, split)]
        return real_pictures(samples, sampler.size)

    def _features(self, pictures: Sequence[RealPicture]) -> Float[Tensor, "N F"]:
        return picture_features([real.picture for real in pictures], self.lite0, cached=True)

    def measure(
        self, sampler: Sampler, plan: Plan, seed: int, on_batch: Callable[[int], None] | None = None
    ) -> tuple[Measured, list[Image.Image]]:
        """Draws the plan's pictures and judges them; the pictures are for people to look at."""
        result = sampler.generate(self.prompts, plan, seed * SEED_STRIDE, on_batch=on_batch)
        assert result.latents is not None
        # in the precision in which they are kept, so that figures are the same from disk
        features = picture_features(result.images, self.lite0).half().float()
        own = torch.arange(len(self.chosen))
        hits = {
            "own_latent": nearest(result.latents.flatten(1), self.latents) == own,
            "own_lite0": nearest(features, self.features, cosine=True) == own,
            "concept_lite0": retrieves_concept(
                features,
                [real.concept for real in self.chosen],
                [real.style for real in self.chosen],
                self.gallery_features,
                [real.concept for real in self.gallery],
                [real.style for real in self.gallery],
            ),
        }
        if self.threshold is not None:
            hits["copies_lite0"] = nearest_distances(features, self.training) <= self.threshold
        num, cost = len(self.chosen), result.cost
        measured = Measured(plan, features, hits, cost.nfe, cost.flops / num, cost.seconds / num)
        return measured, result.images

    def halves(self) -> tuple[Int[Tensor, "H"], Int[Tensor, "H"]]:
        """Prompts on which plans are chosen, and prompts on which they are reported."""
        return halves(len(self.chosen))

    def figures(self, measured: Measured, part: Int[Tensor, "H"]) -> dict[str, Estimate]:
        """KID and the share of hits on some of the prompts."""
        plan = measured.plan
        key = ("tradeoff", plan.blocks, str(plan.steps), str(plan.guidance))
        found = {"kid_lite0": kid(measured.features[part], self.features[part], key, paired=True)}
        return found | {name: proportion(hits[part]) for name, hits in measured.hits.items()}

    def floor(self) -> Estimate:
        """KID of two halves of the real pictures."""
        return real_floor(kid_value, self.features, ("tradeoff",))


def halves(num: int) -> tuple[Int[Tensor, "H"], Int[Tensor, "H"]]:
    """Of `num` prompts those on which plans are chosen, and those on which they are reported."""
    order = torch.from_numpy(keyed_numpy("tradeoff", "halves").permutation(num))
    return order[: num // 2], order[num // 2 :]


def surface(judge: Judge, measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """One row a plan: its axes, cost, figures on both halves of the prompts, and whether its guidance is the one chosen
    for its blocks and steps (least KID on the first half). Claims are made of `reported` alone."""
    choosing, reporting = judge.halves()
    rows = []
    for each in measured:
        chosen, reported = (judge.figures(each, part) for part in (choosing, reporting))
        axes = {name: getattr(each.plan, name) for name in AXES}
        cost = {"nfe": each.nfe, "flops": each.flops, "seconds": each.seconds}
        rows.append({**axes, **cost, "plan": each.plan, "choosing": chosen, "reported": reported})
    for group in _by_blocks_and_steps(rows):
        best = min(group, key=lambda row: row["choosing"]["kid_lite0"].value)
        for row in group:
            row["chosen"] = row is best
    return rows


def _by_blocks_and_steps(rows: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    found: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["blocks"], row["steps"]), []).append(row)
    yield from found.values()


def pareto(
    rows: Sequence[Mapping[str, Any]], cost: str, figure: str = "kid_lite0"
) -> list[Mapping[str, Any]]:
    """Of the chosen rows those that no cheaper one beats, by the figure on the half that they are chosen on: lower is
    better for distances, higher for shares."""
    sign = 1 if figure == "kid_lite0" else -1
    front: list[Mapping[str, Any]] = []
    for row in sorted((row for row in rows if row["chosen"]), key=lambda row: row[cost]):
        value = sign * row["choosing"][figure].value
        if not front or value < sign * front[-1]["choosing"][figure].value:
            front.append(row)
    return front
