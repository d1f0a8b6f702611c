"""The promise of few steps: Inductive Moment Matching and flow matching from one trunk, at equal training FLOPs.

Both arms train the same configuration with every seed, flow matching for as many more steps as make up for IMM's target
pass. Pictures are then drawn with 1 to 32 network evaluations and compared with HELD-OUT real ones, so that copying the
training pictures wins nothing. Flow matching takes the best of Euler and Heun and of its time grids at every number of
evaluations; IMM takes its one uniform grid. `floor` rows are training pictures in place of drawn ones. `ratio` rows
give IMM's distance over flow matching's, with an interval over seeds, prompts and real pictures (paired bootstrap).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks import arms, harness
from mmgen.evaluation.distances import frechet_statistic, kid_statistic
from mmgen.evaluation.intervals import Estimate, Statistic
from mmgen.rng import keyed_numpy
from mmgen.sampling.plan import Plan
from mmgen.training.run import load

SHIFTS = (0.5, 1.0, 2.0)  # flow matching's grids
DRAWS = 400

# What flow matching has apart from the data set's configuration, which is IMM's, and the grids of `--tune`.
SETTINGS: dict[str, dict[str, Any]] = {
    "imm": {},
    "flow_matching": {"modalities.image.time.mean": 0.0, "modalities.image.time.std": 1.0},
}
GRIDS: dict[str, dict[str, tuple[Any, ...]]] = {
    objective: {
        "optim.matrices": ("adamw", "muon"),
        "optim.lr": (2e-3, 4e-3),
        "modalities.image.time.kind": ("uniform", "logit_normal"),
    }
    for objective in ("imm", "flow_matching")
}


@dataclass(frozen=True)
class Arguments(harness.Arguments):
    seeds: int = 5
    """Runs of each objective, with seeds 0, 1, ..."""
    data: arms.DataName = "digits"
    """What is drawn; the data set is built where it is missing."""
    steps: tuple[int, ...] = (1, 2, 4, 8, 16, 20, 32)
    """Network evaluations of a picture."""
    train_steps: int | None = None
    """Of IMM; the configuration's where it is not given."""
    copies: int = 2
    """Pictures drawn for each held-out one's caption."""
    runs: Path = Path("runs/headline")
    """Where runs are kept; one that is there is continued, or taken as it is."""
    workers: int = 2
    """Runs trained side by side, with a thread each."""
    tune: bool = False
    """Train every setting of both grids with a seed of its own instead, and show each one's distances."""


def measure(arguments: Arguments) -> list[harness.Row]:
    config = arms.prepare(arguments.data)
    steps = 20 if arguments.quick else arguments.train_steps or config.train.steps
    lengths = {"imm": steps, "flow_matching": round(steps * arms.cost_ratio(config))}
    runs = _tuning_runs(arguments, lengths) if arguments.tune else _runs(arguments, lengths)
    arms.train(runs, arguments.workers)
    side = arms.real(config, arguments.data)
    draws: dict[tuple[str, int, int], dict[str, np.ndarray]] = {}
    rows: list[harness.Row] = [arms.floor(side, len(side.held_out) * arguments.copies)]
    for run in runs:
        sampler = load(run.folder)
        for steps in arguments.steps:
            drawn = arms.draw(sampler, _plans(run.objective, steps), side, arguments.copies, run.seed)
            rows.append(
                {
                    "objective": run.objective,
                    "steps": steps,
                    "seed": run.seed,
                    **drawn.row,
                    "solver": drawn.plan.solver,
                    "shift": drawn.plan.shift,
                    "train_steps": run.steps,
                    **{key: str(value) for key, value in run.settings.items()},
                }
            )
            if not arguments.tune:
                draws[run.objective, steps, run.seed] = _resampled(drawn.features, side.features, run.seed)
    return rows if arguments.tune else rows + _ratios(draws, arguments)


def _runs(arguments: Arguments, lengths: Mapping[str, int]) -> list[arms.Run]:
    size = "-quick" if arguments.quick else ""
    return [
        arms.Run(
            arguments.runs / f"{arguments.data}-{objective}-{seed}{size}",
            arguments.data,
            objective,
            seed,
            lengths[objective],
            SETTINGS[objective],
        )
        for seed in range(arguments.seeds)
        for objective in ("imm", "flow_matching")
    ]


def _tuning_runs(arguments: Arguments, lengths: Mapping[str, int]) -> list[arms.Run]:
    return [
        arms.Run(
            arguments.runs / f"{arguments.data}-tune-{objective}-{number}",
            arguments.data,
            objective,
            100,
            lengths[objective],
            {**SETTINGS[objective], **dict(zip(GRIDS[objective], values, strict=True))},
        )
        for objective in ("imm", "flow_matching")
        for number, values in enumerate(product(*GRIDS[objective].values()))
    ]


def _plans(objective: str, evaluations: int) -> list[Plan]:
    if objective == "imm":
        return [Plan(steps=evaluations)]
    plans = [Plan(steps=evaluations, shift=shift) for shift in SHIFTS if evaluations > 1 or shift == 1]
    if evaluations % 2 == 0:
        plans += [
            replace(plan, steps=evaluations // 2, solver="heun")
            for plan in plans
            if evaluations > 2 or plan.shift == 1
        ]
    return plans


def _resampled(
    features: Float[Tensor, "N F"], real: Float[Tensor, "M F"], seed: int
) -> dict[str, np.ndarray]:
    """Both distances, first as they are and then for every bootstrap draw. Real pictures are drawn alike for all runs,
    and drawn ones alike for both objectives of a seed: their noise and captions are the same.
    """
    counts = []
    for key, number in ((("drawn", seed), len(features)), (("real", 0), len(real))):
        drawn = keyed_numpy("headline", *key).multinomial(number, [1 / number] * number, size=DRAWS)
        counts.append(torch.cat([torch.ones(1, number).double(), torch.from_numpy(drawn).double()]))
    found: dict[str, np.ndarray] = {}
    statistics: dict[str, Statistic] = {
        "frechet": frechet_statistic(features, real),
        "kid": kid_statistic(features, real),
    }
    for name, statistic in statistics.items():
        found[name] = statistic(*counts).numpy()
    return found


def _ratios(
    draws: Mapping[tuple[str, int, int], Mapping[str, np.ndarray]], arguments: Arguments
) -> list[harness.Row]:
    """IMM at N over flow matching at every N', and the step ratio: how many steps flow matching needs, over N."""
    seeds = range(arguments.seeds)
    rng = keyed_numpy("headline", "seeds")
    weights = rng.multinomial(len(seeds), [1 / len(seeds)] * len(seeds), size=DRAWS)
    weights = np.concatenate([np.ones((1, len(seeds))), weights])

    def means(objective: str, steps: int, metric: str) -> np.ndarray:
        values = np.stack([draws[objective, steps, seed][metric] for seed in seeds], axis=1)
        return (values * weights).sum(1) / weights.sum(1)

    rows: list[harness.Row] = []
    for steps in arguments.steps:
        reached: dict[str, Any] = {}
        ratios: dict[int, dict[str, Estimate]] = {}
        for other in arguments.steps:
            ratios[other] = {
                metric: _estimate(
                    means("imm", steps, metric) / means("flow_matching", other, metric), len(seeds)
                )
                for metric in ("frechet", "kid")
            }
        for metric in ("frechet", "kid"):
            beaten = [other for other in arguments.steps if ratios[other][metric].value <= 1]
            reached[f"step_ratio_{metric}"] = max(beaten) / steps if beaten else 0.0
        for other in arguments.steps:
            rows.append(
                {
                    "objective": "ratio",
                    "steps": steps,
                    "flow_matching_steps": other,
                    "frechet_ratio": ratios[other]["frechet"],
                    "kid_ratio": ratios[other]["kid"],
                    **reached,
                }
            )
    return rows


def _estimate(values: np.ndarray, num: int) -> Estimate:
    """The first value, with the basic bootstrap interval of the rest on a log scale where all are positive: resampling
    adds the same bias to each draw, which the reflection takes off."""
    value, rest = float(values[0]), values[1:]
    if value > 0 and (rest > 0).all():
        low, high = np.exp(2 * np.log(value) - np.quantile(np.log(rest), [0.975, 0.025]))
    else:
        low, high = 2 * value - np.quantile(rest, [0.975, 0.025])
    return Estimate(value, float(low), float(high), num)


if __name__ == "__main__":
    harness.run("headline", Arguments, measure, __doc__)
