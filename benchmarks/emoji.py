"""Captioned emoji at every level of detail: IMM and flow matching by steps, at equal training FLOPs.

Both arms train `configs/demo.yaml` with every seed. Prompts are captions of training pictures: some name one picture
(concept and style), others many (a concept in up to six styles, a whole group). Each drawn picture belongs to the real
one whose caption it was drawn for; `hit`: the nearest of all training latents (L2) bears that caption at that level;
`kid`: lite0 features against the real pictures; `styles`: how many different real pictures are nearest to those drawn
for one caption, over how many would be for as many real ones. `less steps` rows compare IMM at few steps
with flow matching at many, on the same captions and noise (bootstrap over captions and seeds); each has the better of
the time grids by KID over all seeds.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from benchmarks import arms, harness
from mmgen.config import load_yaml
from mmgen.evaluation.alignment import nearest
from mmgen.evaluation.distances import kid, kid_statistic
from mmgen.evaluation.evaluate import SEED_STRIDE, encode
from mmgen.evaluation.features import Lite0Features, picture_features
from mmgen.evaluation.intervals import Estimate, proportion
from mmgen.evaluation.real import SEEN, read_split, real_pictures
from mmgen.rng import keyed_numpy
from mmgen.sampling.plan import Plan
from mmgen.sampling.sampler import Sampler
from mmgen.training.run import RunConfig, default_device, load

CONFIG = "demo"
LEVELS = ("name_style", "tags", "name", "group")
Objective = Literal["imm", "flow_matching"]
DRAWS = 1000
# What flow matching has apart from the configuration, which is IMM's: its one-time law needs no uniform share.
SETTINGS: dict[Objective, dict[str, Any]] = {
    "imm": {},
    "flow_matching": {"modalities.image.time.uniform": 0.0},
}


@dataclass(frozen=True)
class Arguments(harness.Arguments):
    steps: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Refinement steps of a picture."""
    guidance: tuple[float, ...] = (1.0, 3.0)
    """1 is none; others cost two network evaluations a step."""
    shifts: tuple[float, ...] = (0.33, 1.0)
    """Time grids; compared is the better one of each objective."""
    num: int = 200
    """Pictures drawn for each level of detail."""
    few: int = 2
    """Steps of IMM in the comparison."""
    many: int = 16
    """Steps of flow matching in the comparison."""
    train_steps: int | None = None
    """Of IMM; the configuration's where it is not given."""
    runs: Path = Path("runs/emoji_steps")
    """Where runs are kept; one that is there is continued, or taken as it is."""
    workers: int = 2
    """Runs trained side by side, with a thread each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("few", "many"):
            if getattr(self, name) not in self.steps:
                raise ValueError(f"{name} {getattr(self, name)} is none of steps {self.steps}")


@dataclass(frozen=True)
class Real:
    """Captions of all training pictures at every level, and which ones' are asked for."""

    captions: Mapping[str, list[str]]
    latents: Float[Tensor, "T F"]
    features: Float[Tensor, "T F"]
    asked: Int[Tensor, "N"]


# (objective, level, guidance, shift, steps) -> of each seed
Case = tuple[str, str, float, float, int]


@dataclass(frozen=True)
class Drawn:
    """One case and seed: features of what was drawn, and which hit."""

    features: Float[Tensor, "N F"]
    hits: Bool[Tensor, "N"]


def measure(arguments: Arguments) -> list[harness.Row]:
    config = load_yaml(Path(f"configs/{CONFIG}.yaml"), RunConfig)
    steps = 20 if arguments.quick else arguments.train_steps or config.train.steps
    lengths: dict[Objective, int] = {"imm": steps, "flow_matching": round(steps * arms.cost_ratio(config))}
    runs = [
        arms.Run(
            arguments.runs / f"{objective}-{seed}-{num}", CONFIG, objective, seed, num, SETTINGS[objective]
        )
        for seed in range(arguments.seeds)
        for objective, num in lengths.items()
    ]
    arms.train(runs, arguments.workers)
    real = _real(config, load(runs[0].folder), Lite0Features(default_device()), arguments)
    rows: list[harness.Row] = []
    found: dict[Case, list[Drawn]] = defaultdict(list)
    with arms.side_by_side(arguments.workers) as pool:
        for scored in pool.map(partial(_scored, arguments, real), runs):
            for case, drawn, row in scored:
                found[case].append(drawn)
                rows.append(row)
    return rows + _comparisons(found, real, arguments)


def _scored(arguments: Arguments, real: "Real", run: arms.Run) -> list[tuple["Case", "Drawn", harness.Row]]:
    sampler, lite0 = load(run.folder), Lite0Features(default_device())
    scored = []
    for case in _cases(run.objective, arguments):
        drawn, row = _draw(sampler, real, case, run.seed, lite0)
        scored.append((case, drawn, {**row, "train_steps": run.steps}))
    return scored


def _real(config: RunConfig, sampler: Sampler, lite0: Lite0Features, arguments: Arguments) -> Real:
    samples = [
        sample
        for source in config.data.sources.values()
        for sample in read_split(source, SEEN)
        if sample.picture is not None and all(sample.captions.get(level) for level in LEVELS)
    ]
    images = [picture.picture for picture in real_pictures(samples, sampler.size)]
    num = min(len(samples), 12 if arguments.quick else arguments.num)
    order = keyed_numpy("emoji", "asked").permutation(len(samples))[:num]
    latents, features = encode(images, sampler).flatten(1), picture_features(images, lite0)
    captions = {level: [sample.captions[level] for sample in samples] for level in LEVELS}
    return Real(captions, latents, features, torch.from_numpy(order))


def _cases(objective: str, arguments: Arguments) -> list[Case]:
    return [
        (objective, level, guidance, shift, steps)
        for level in LEVELS
        for guidance in arguments.guidance
        for steps in arguments.steps
        for shift in (arguments.shifts if steps > 1 else arguments.shifts[:1])
    ]


def _draw(
    sampler: Sampler, real: Real, case: Case, seed: int, lite0: Lite0Features
) -> tuple[Drawn, harness.Row]:
    objective, level, guidance, shift, steps = case
    captions, asked = real.captions[level], real.asked
    prompts = [captions[index] for index in asked.tolist()]
    plan = Plan(steps=steps, guidance=guidance, shift=shift)
    result = sampler.generate(prompts, plan, seed * SEED_STRIDE)
    assert result.latents is not None
    own = nearest(result.latents.flatten(1), real.latents)
    hits = torch.tensor([captions[i] == prompt for i, prompt in zip(own.tolist(), prompts, strict=True)])
    drawn = Drawn(picture_features(result.images, lite0), hits)
    row: dict[str, Any] = {
        "objective": objective,
        "level": level,
        "steps": steps,
        "guidance": guidance,
        "shift": shift,
        "seed": seed,
        "nfe": result.cost.nfe,
        "hit": proportion(hits),
        "kid": kid(drawn.features, real.features[asked], ("emoji", *map(str, case), seed), paired=True),
        "styles": _variety(prompts, own.tolist(), captions),
    }
    return drawn, row


def _variety(prompts: Sequence[str], own: Sequence[int], captions: Sequence[str]) -> float | None:
    """Different real pictures nearest to those drawn for a caption, over their expected number if as many real ones
    of that caption were drawn at random (with replacement); of captions with several of both. What is nearest to a
    picture of another caption is not counted."""
    nearest_of: dict[str, list[int]] = defaultdict(list)
    for prompt, index in zip(prompts, own, strict=True):
        nearest_of[prompt].append(index)
    seen, expected = 0.0, 0.0
    for prompt, indices in nearest_of.items():
        num = captions.count(prompt)
        if num > 1 and len(indices) > 1:
            seen += len({index for index in indices if captions[index] == prompt})
            expected += num * (1 - (1 - 1 / num) ** len(indices))
    return seen / expected if expected else None


def _comparisons(
    found: Mapping[Case, Sequence[Drawn]], real: Real, arguments: Arguments
) -> list[harness.Row]:
    """IMM at `few` steps less flow matching at `many`, for each level and guidance."""
    rows: list[harness.Row] = []
    for level in LEVELS:
        for guidance in arguments.guidance:
            cases = [
                _best(found, real, (objective, level, guidance), steps)
                for objective, steps in (("imm", arguments.few), ("flow_matching", arguments.many))
            ]
            one, other = (found[case] for case in cases)
            rows.append(
                {
                    "objective": "less steps",
                    "level": level,
                    "guidance": guidance,
                    "steps": arguments.few,
                    "flow_matching_steps": arguments.many,
                    "shift": cases[0][3],
                    "flow_matching_shift": cases[1][3],
                    "kid_difference": _difference(_kids(one, real), _kids(other, real), len(one)),
                    "hit_difference": _difference(_hits(one, real), _hits(other, real), len(one)),
                }
            )
    return rows


def _best(found: Mapping[Case, Sequence[Drawn]], real: Real, key: tuple[str, str, float], steps: int) -> Case:
    cases = [case for case in found if case[:3] == key and case[4] == steps]
    return min(cases, key=lambda case: float(np.mean(_kids(found[case], real)[:, 0])))


def _kids(drawn: Sequence[Drawn], real: Real) -> np.ndarray:
    """Per seed the KID, and then that of every bootstrap draw of captions, which are drawn alike for all."""
    others, counts = real.features[real.asked], _counts(len(real.asked))
    return np.stack([kid_statistic(each.features, others, paired=True)(counts).numpy() for each in drawn])


def _hits(drawn: Sequence[Drawn], real: Real) -> np.ndarray:
    counts = _counts(len(real.asked))
    return np.stack([((counts @ each.hits.double()) / counts.sum(1)).numpy() for each in drawn])


def _counts(num: int) -> Float[Tensor, "D N"]:
    drawn = keyed_numpy("emoji", "counts").multinomial(num, [1 / num] * num, size=DRAWS)
    return torch.cat([torch.ones(1, num).double(), torch.from_numpy(drawn).double()])


def _difference(one: np.ndarray, other: np.ndarray, num: int) -> Estimate:
    """Mean over seeds of what two values differ by, with an interval over captions and seeds."""
    rng = keyed_numpy("emoji", "seeds")
    weights = rng.multinomial(num, [1 / num] * num, size=one.shape[1] - 1)
    weights = np.concatenate([np.ones((1, num)), weights])
    values = ((one - other).T * weights).sum(1) / weights.sum(1)
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return Estimate(float(values[0]), float(low), float(high), num)


if __name__ == "__main__":
    harness.run("emoji", Arguments, measure, __doc__)
