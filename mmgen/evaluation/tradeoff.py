"""The surface: what quality each unit of inference compute buys, over the axes of one model's plans.

Every plan draws one picture for each of the same prompts, with the same noise, and is judged picture by picture. What
is chosen (the guidance of plans that are alike but for it) is chosen on one half of the prompts and reported on the
other: a plan that was lucky on the one is not on the other. Loads no run, prints nothing and writes nothing.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from sklearn.svm import SVC
from torch import Tensor

from mmgen.data.source import SourceConfig
from mmgen.evaluation.alignment import nearest, retrieves_concept
from mmgen.evaluation.distances import kid, kid_value, real_floor
from mmgen.evaluation.evaluate import SEED_STRIDE, encode
from mmgen.evaluation.features import Lite0Features, picture_features
from mmgen.evaluation.intervals import Estimate, proportion
from mmgen.evaluation.memorization import MIN_HELD_OUT, QUANTILE, nearest_distances
from mmgen.evaluation.real import SEEN, RealPicture, read_split, real_pictures, splits_of
from mmgen.rng import keyed_numpy
from mmgen.sampling.adaptive import Policy
from mmgen.sampling.cost import Cost
from mmgen.sampling.plan import Plan, import_function
from mmgen.sampling.request import Request
from mmgen.sampling.sampler import Sampler
from mmgen.sampling.score import score_pictures

HITS = ("own_latent", "own_lite0", "concept_lite0", "label_lite0", "copies_lite0")
AXES = ("blocks", "steps", "guidance", "thinking", "candidates")
MAX_LABELS = 100
PICTURES_PER_LABEL = 20  # of training at least, for a classifier
CLASSIFIER_PICTURES = 10_000
# what people are shown of a figure
FIGURES = {
    "kid_lite0": "KID-lite0",
    "own_latent": "own nearest, latents",
    "own_lite0": "own nearest, lite0",
    "concept_lite0": "concept nearest",
    "label_lite0": "label",
    "copies_lite0": "copies",
}


@dataclass(frozen=True)
class TradeoffConfig:
    """Which plans are measured, and on how many prompts of which split (none: the first held-out one).

    An axis is a field of `Plan` with values for it, or `package.module:function`, which makes a plan of a plan and one
    of the values. `scorer` judges every picture too, for planners that look at them. Prompts are
    the captions of one `level` of detail.
    """

    axes: Mapping[str, Sequence[Any]] = field(
        default_factory=lambda: {"steps": (1, 2, 4, 8), "guidance": (1.0, 2.0, 3.0)}
    )
    num: int = 200
    split: str | None = None
    seed: int = 0
    scorer: str | None = None
    level: str = "text"

    def __post_init__(self) -> None:
        known = [each.name for each in fields(Plan)]
        for name, values in self.axes.items():
            if not values:
                raise ValueError(f"{name} must name one value or more")
            if name not in known and ":" not in name:
                raise ValueError(
                    f"axis {name!r} is no part of a plan ({', '.join(known)}) and no package.module:function"
                )
        if self.num < 8:
            raise ValueError(
                f"num {self.num} must be at least 8: a distance on each half takes four pictures"
            )

    def plans(self, base: Plan) -> list[Plan]:
        """Every combination once, cheap ones first."""
        made = [base]
        for name, values in self.axes.items():
            made = [_moved(plan, name, value) for plan in made for value in values]

        def evaluations(plan: Plan) -> tuple[int, int]:
            calls = sum(plan.block_steps) * plan.candidates
            return calls, calls if plan.guidance != 1 else 0

        return sorted(dict.fromkeys(made), key=evaluations)


def _moved(plan: Plan, axis: str, value: Any) -> Plan:
    if ":" in axis:
        return import_function(axis, "axis", "plan, value")(plan, value)
    # the number of blocks decides how many steps there are to name
    other = {"steps": plan.block_steps[0]} if axis == "blocks" else {}
    return replace(plan, **other, **{axis: value})


@dataclass(frozen=True)
class Measured:
    """Pictures of one plan: features, whether each hits (see `Judge`), its scorer's score, and what one cost.

    hits: own_latent, own_lite0: the nearest of the prompts' real pictures is its own. concept_lite0: the nearest real
    picture of another style shows its concept. label_lite0: a classifier of real pictures says its concept (where there
    are few concepts of many pictures each). copies_lite0: nearer to a training picture than 95 % of held-out ones are
    (absent where there are too few of those). `memory` is bytes of a whole batch: of keys and values, on a
    GPU of all that was allocated at its peak. Scoring is counted apart.
    """

    plan: Plan
    features: Float[Tensor, "N F"]
    hits: Mapping[str, Bool[Tensor, "N"]]
    nfe: float
    flops: float
    seconds: float
    memory: int = 0
    scores: Float[Tensor, "N"] | None = None
    score_flops: float = 0.0
    score_seconds: float = 0.0
    policy: Policy | None = None
    """which drew some of the pictures by a second plan, where they are no plan's own"""


class Judge:
    """The real side of a surface: prompts, their pictures in features and latents, and the halves of the prompts."""

    def __init__(self, sampler: Sampler, sources: Mapping[str, SourceConfig], config: TradeoffConfig) -> None:
        splits = splits_of(sources)
        self.split = config.split or next((split for split in splits if split != SEEN), SEEN)
        if self.split not in splits:
            raise ValueError(f"the data has no split {self.split!r}, only {', '.join(splits)}")
        self.lite0 = Lite0Features()
        pictures = {split: self._pictures(sampler, sources, split) for split in splits}
        self.level = config.level
        there = [i for i, real in enumerate(pictures[self.split]) if real.captions.get(self.level)][
            : config.num
        ]
        self.chosen = [pictures[self.split][i] for i in there]
        if len(self.chosen) < 8:
            raise ValueError(
                f"the split {self.split!r} has {len(self.chosen)} pictures with a caption {self.level!r}, at least 8 "
                "are needed"
            )
        gallery = [SEEN] if self.split == SEEN else [SEEN, self.split]
        self.gallery = [real for name in gallery for real in pictures[name]]
        features = {name: self._features(members) for name, members in pictures.items()}
        self.gallery_features = torch.cat([features[name] for name in gallery])
        self.features = features[self.split][there]
        self.latents = encode([real.picture for real in self.chosen], sampler).flatten(1)
        self.training = features[SEEN]
        self.scorer = config.scorer
        self.classifier = self._classifier(pictures[SEEN])
        held_out = [name for name in splits if name != SEEN] if self.split == SEEN else [self.split]
        reference = torch.cat([features[name] for name in held_out])
        self.threshold = None
        if len(reference) >= MIN_HELD_OUT:
            self.threshold = nearest_distances(reference, self.training).quantile(QUANTILE)

    @property
    def prompts(self) -> list[str]:
        return [real.captions[self.level] for real in self.chosen]

    def _pictures(
        self, sampler: Sampler, sources: Mapping[str, SourceConfig], split: str
    ) -> list[RealPicture]:
        samples = [sample for source in sources.values() for sample in read_split(source, split)]
        return real_pictures(samples, sampler.size)

    def _features(self, pictures: Sequence[RealPicture]) -> Float[Tensor, "N F"]:
        return picture_features([real.picture for real in pictures], self.lite0, cached=True)

    def _classifier(self, training: Sequence[RealPicture]) -> SVC | None:
        """Of concepts by lite0's features; None where there are many concepts, or few pictures of each."""
        num_labels = len({real.concept for real in training})
        if not 2 <= num_labels <= MAX_LABELS or len(training) < PICTURES_PER_LABEL * num_labels:
            return None
        some = training[:CLASSIFIER_PICTURES]
        return SVC(gamma="scale", C=10.0).fit(
            self.training[: len(some)].numpy(), [real.concept for real in some]
        )

    def labels(self, features: Float[Tensor, "N F"]) -> Bool[Tensor, "N"]:
        """Whether the classifier says of each picture what its prompt asked for."""
        assert self.classifier is not None, "there are labels"
        asked = [real.concept for real in self.chosen]
        said = self.classifier.predict(features.numpy())
        return torch.tensor([one == other for one, other in zip(said, asked, strict=True)])

    def measure(
        self, sampler: Sampler, plan: Plan, seed: int, on_batch: Callable[[int], None] | None = None
    ) -> tuple[Measured, list[Image.Image]]:
        """Draws the plan's pictures and judges them; the pictures are for people to look at."""
        on_gpu = sampler.model.text_embedding.weight.is_cuda
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        result = sampler.generate(self.prompts, plan, seed * SEED_STRIDE, on_batch=on_batch)
        assert result.latents is not None
        memory = torch.cuda.max_memory_allocated() if on_gpu else result.cost.memory
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
        if self.classifier is not None:
            hits["label_lite0"] = self.labels(features)
        if self.threshold is not None:
            hits["copies_lite0"] = nearest_distances(features, self.training) <= self.threshold
        num, cost = len(self.chosen), result.cost
        measured = Measured(plan, features, hits, cost.nfe, cost.flops / num, cost.seconds / num, memory)
        if self.scorer is not None:
            spent, requests = Cost(), [Request((prompt,)) for prompt in self.prompts]
            scores = score_pictures(sampler, self.scorer, requests, result.latents, spent)
            measured = replace(
                measured, scores=scores, score_flops=spent.flops / num, score_seconds=spent.seconds / num
            )
        return measured, result.images

    def halves(self) -> tuple[Int[Tensor, "H"], Int[Tensor, "H"]]:
        """Prompts on which plans are chosen, and prompts on which they are reported."""
        return halves(len(self.chosen))

    def figures(self, measured: Measured, part: Int[Tensor, "H"]) -> dict[str, Estimate]:
        """KID and the share of hits on some of the prompts."""
        key = ("tradeoff", str(measured.policy or measured.plan))
        found = {"kid_lite0": kid(measured.features[part], self.features[part], key, paired=True)}
        return found | {name: proportion(hits[part]) for name, hits in measured.hits.items()}

    def floor(self) -> Estimate:
        """KID of two halves of the real pictures."""
        return real_floor(kid_value, self.features, ("tradeoff",))

    def ceilings(self) -> dict[str, Estimate]:
        """What the real pictures score where not all of them hit."""
        return {} if self.classifier is None else {"label_lite0": proportion(self.labels(self.features))}


def halves(num: int) -> tuple[Int[Tensor, "H"], Int[Tensor, "H"]]:
    """Of `num` prompts those on which plans are chosen, and those on which they are reported."""
    order = torch.from_numpy(keyed_numpy("tradeoff", "halves").permutation(num))
    return order[: num // 2], order[num // 2 :]


def surface(judge: Judge, measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """One row a plan: its axes, cost, figures on both halves of the prompts, and whether its guidance is the one chosen
    for what else it is (least KID on the first half). Claims are made of `reported` alone."""
    choosing, reporting = judge.halves()
    rows = []
    for each in measured:
        chosen, reported = (judge.figures(each, part) for part in (choosing, reporting))
        axes = {name: getattr(each.plan, name) for name in AXES}
        cost = {name: getattr(each, name) for name in ("nfe", "flops", "seconds", "memory")}
        rows.append({**axes, **cost, "plan": each.plan, "choosing": chosen, "reported": reported})
    for group in _alike_but_for_guidance(rows):
        best = min(group, key=lambda row: row["choosing"]["kid_lite0"].value)
        for row in group:
            row["chosen"] = row is best
    return rows


def _alike_but_for_guidance(rows: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    found: dict[Plan, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(replace(row["plan"], guidance=1.0), []).append(row)
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
