"""Captioned emoji at every level of detail: IMM and flow matching by steps, at equal training FLOPs.

Both arms train `configs/demo.yaml` with every seed, for twice its steps, with settings of their own (SETTINGS).
Prompts are captions of training pictures, which the drawn ones are compared with: some name one picture (concept and
style), and to draw it is what is asked for, others many (a concept in up to six styles, a whole group). Each drawn
picture belongs to the real one whose caption it was drawn for; `hit`: the nearest of all training latents (L2) bears
that caption at that level; `kid`: lite0 features against the real pictures; `styles`: how many different real
pictures are nearest to those drawn for one caption, over how many would be for as many real ones. `floor` rows are a
real picture of the caption in place of the drawn one, any of those that bear it, through the codec. `less steps` rows
compare IMM at few network evaluations with flow matching at every number, on the same captions and noise (an interval
over seeds and captions); each has the best of the time grids, flow matching of Euler and Heun too, by KID over all
seeds. Six runs train in an hour of two cores, and are scored in another.
"""

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

from benchmarks import arms, harness
from mmgen.config import load_yaml
from mmgen.evaluation.alignment import nearest
from mmgen.evaluation.distances import kid, kid_statistic
from mmgen.evaluation.evaluate import SEED_STRIDE, decode, encode
from mmgen.evaluation.features import Lite0Features, picture_features
from mmgen.evaluation.intervals import proportion
from mmgen.evaluation.real import SEEN, read_split, real_pictures
from mmgen.rng import keyed_numpy
from mmgen.sampling.plan import Plan
from mmgen.sampling.sampler import Sampler
from mmgen.training.run import RunConfig, default_device, load

CONFIG = "demo"
LEVELS = ("name_style", "tags", "name", "group")
DRAWS = 1000
# What each has apart from the configuration, which is of a hybrid for half as many steps. In these IMM has the time
# to go from velocities to jumps: anchors fall to none, and k rises. Flow matching's one-time law needs no uniform
# share, and long waves of times are for strides, of which it has none.
SETTINGS: dict[arms.Objective, dict[str, Any]] = {
    "imm": {"objective.k_final": 8.0, "objective.anchors_final": 0.0},
    "flow_matching": {"modalities.image.time.uniform": 0.0, "model.time_scale": 100},
}


@dataclass(frozen=True)
class Arguments(harness.Arguments):
    steps: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Network evaluations of a picture without guidance, or of each of the two with it."""
    guidance: tuple[float, ...] = (1.0, 2.0)
    """1 is none; others cost two network evaluations a step."""
    shifts: tuple[float, ...] = (0.33, 1.0, 3.0)
    """Time grids; compared is the best one of each objective."""
    num: int = 200
    """Pictures drawn for each level of detail."""
    few: int = 2
    """Of IMM in the comparison."""
    train_steps: int = 1440
    """Of IMM."""
    runs: Path = Path("runs/emoji_steps")
    """Where runs are kept; one that is there is continued, or taken as it is."""
    workers: int = 2
    """Runs trained side by side, with a thread each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.few not in self.steps:
            raise ValueError(f"few {self.few} is none of steps {self.steps}")


@dataclass(frozen=True)
class Real:
    """Captions of all training pictures at every level, and which ones' are asked for."""

    captions: Mapping[str, list[str]]
    latents: Float[Tensor, "T ..."]
    features: Float[Tensor, "T F"]
    asked: Int[Tensor, "N"]

    def prompts(self, level: str) -> list[str]:
        return [self.captions[level][index] for index in self.asked.tolist()]


@dataclass(frozen=True)
class Case:
    """What is drawn by every seed."""

    objective: arms.Objective
    level: str
    steps: int
    """network evaluations without guidance"""
    plan: Plan


@dataclass(frozen=True)
class Drawn:
    """One case and seed: features of what was drawn, and which hit."""

    features: Float[Tensor, "N F"]
    hits: Bool[Tensor, "N"]


def measure(arguments: Arguments) -> list[harness.Row]:
    config = load_yaml(Path(f"configs/{CONFIG}.yaml"), RunConfig)
    steps = 20 if arguments.quick else arguments.train_steps
    lengths: dict[arms.Objective, int] = {
        "imm": steps,
        "flow_matching": round(steps * arms.cost_ratio(config)),
    }
    runs = [
        arms.Run(
            arguments.runs / f"{objective}-{seed}-{num}", CONFIG, objective, seed, num, SETTINGS[objective]
        )
        for seed in range(arguments.seeds)
        for objective, num in lengths.items()
    ]
    arms.train(runs, arguments.workers)
    sampler, lite0 = load(runs[0].folder), Lite0Features(default_device())
    real = _real(config, sampler, lite0, arguments)
    rows = [_floor(sampler, real, level, lite0) for level in LEVELS]
    found: dict[Case, list[Drawn]] = defaultdict(list)
    with arms.side_by_side(arguments.workers) as pool:
        for run, scored in zip(runs, pool.map(partial(_scored, arguments, real), runs), strict=True):
            print(f"{run.folder} is scored", file=sys.stderr)
            for case, drawn, row in scored:
                found[case].append(drawn)
                rows.append(row)
    return rows + _comparisons(found, real, arguments)


def _scored(arguments: Arguments, real: Real, run: arms.Run) -> list[tuple[Case, Drawn, harness.Row]]:
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
    latents, features = encode(images, sampler), picture_features(images, lite0)
    captions = {level: [sample.captions[level] for sample in samples] for level in LEVELS}
    return Real(captions, latents, features, torch.from_numpy(order))


def _cases(objective: arms.Objective, arguments: Arguments) -> list[Case]:
    return [
        Case(objective, level, steps, replace(plan, guidance=guidance))
        for level in LEVELS
        for guidance in arguments.guidance
        for steps in arguments.steps
        for plan in arms.plans(objective, steps, arguments.shifts)
    ]


def _draw(
    sampler: Sampler, real: Real, case: Case, seed: int, lite0: Lite0Features
) -> tuple[Drawn, harness.Row]:
    prompts = real.prompts(case.level)
    result = sampler.generate(prompts, case.plan, seed * SEED_STRIDE)
    assert result.latents is not None
    drawn, figures = _judged(result.latents, result.images, real, case.level, lite0)
    row: dict[str, Any] = {
        "objective": case.objective,
        "level": case.level,
        "steps": case.steps,
        "guidance": case.plan.guidance,
        "solver": case.plan.solver,
        "shift": case.plan.shift,
        "seed": seed,
        "nfe": result.cost.nfe,
        **figures,
    }
    return drawn, row


def _judged(
    latents: Float[Tensor, "N ..."],
    images: Sequence[Image.Image],
    real: Real,
    level: str,
    lite0: Lite0Features,
) -> tuple[Drawn, dict[str, Any]]:
    captions, prompts = real.captions[level], real.prompts(level)
    own = nearest(latents.flatten(1), real.latents.flatten(1)).tolist()
    hits = torch.tensor([captions[i] == prompt for i, prompt in zip(own, prompts, strict=True)])
    drawn = Drawn(picture_features(images, lite0), hits)
    key = ("emoji", level, len(prompts))
    return drawn, {
        "hit": proportion(hits),
        "kid": kid(drawn.features, real.features[real.asked], key, paired=True),
        "styles": _variety(prompts, own, captions),
    }


def _floor(sampler: Sampler, real: Real, level: str, lite0: Lite0Features) -> harness.Row:
    """A real picture of each prompt's caption, as the codec gives it back."""
    captions, rng = np.array(real.captions[level]), keyed_numpy("emoji", "floor", level)
    chosen = [int(rng.choice(np.flatnonzero(captions == prompt))) for prompt in real.prompts(level)]
    latents = real.latents[chosen]
    figures = _judged(latents, decode(latents, sampler), real, level, lite0)[1]
    return {"objective": "floor", "level": level, **figures}


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
    """IMM at `few` steps less flow matching at every number, for each level and guidance."""
    rows: list[harness.Row] = []
    for level in LEVELS:
        for guidance in arguments.guidance:
            few = _best(found, real, "imm", level, guidance, arguments.few)
            for steps in arguments.steps:
                many = _best(found, real, "flow_matching", level, guidance, steps)
                one, other = found[few], found[many]
                rows.append(
                    {
                        "objective": "less steps",
                        "level": level,
                        "guidance": guidance,
                        "steps": arguments.few,
                        "shift": few.plan.shift,
                        "flow_matching_steps": steps,
                        "flow_matching_solver": many.plan.solver,
                        "flow_matching_shift": many.plan.shift,
                        "kid_difference": arms.difference(_kids(one, real), _kids(other, real)),
                        "hit_difference": arms.difference(_hits(one, real), _hits(other, real)),
                    }
                )
    return rows


def _best(
    found: Mapping[Case, Sequence[Drawn]],
    real: Real,
    objective: str,
    level: str,
    guidance: float,
    steps: int,
) -> Case:
    wanted = (objective, level, guidance, steps)
    cases = [case for case in found if (case.objective, case.level, case.plan.guidance, case.steps) == wanted]
    return min(cases, key=lambda case: float(_kids(found[case], real, draws=0).mean()))


def _kids(drawn: Sequence[Drawn], real: Real, draws: int = DRAWS) -> np.ndarray:
    """KID [1 + draws, seeds], as it is and for every bootstrap draw of captions, which are drawn alike for all."""
    others, counts = real.features[real.asked], _counts(len(real.asked), draws)
    return np.stack(
        [kid_statistic(each.features, others, paired=True)(counts).numpy() for each in drawn], axis=1
    )


def _hits(drawn: Sequence[Drawn], real: Real) -> np.ndarray:
    counts = _counts(len(real.asked), DRAWS)
    return np.stack([((counts @ each.hits.double()) / counts.sum(1)).numpy() for each in drawn], axis=1)


def _counts(num: int, draws: int) -> Float[Tensor, "D N"]:
    drawn = keyed_numpy("emoji", "counts").multinomial(num, [1 / num] * num, size=draws)
    return torch.cat([torch.ones(1, num).double(), torch.from_numpy(drawn).double()])


if __name__ == "__main__":
    harness.run("emoji", Arguments, measure, __doc__)
