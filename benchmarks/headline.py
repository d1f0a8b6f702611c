"""The promise of few steps: Inductive Moment Matching and flow matching from one trunk, at equal training FLOPs.

Both arms train the same configuration with every seed, flow matching for as many more steps as make up for IMM's target
pass. Pictures are then drawn with 1 to 32 network evaluations and compared with HELD-OUT real ones, so that copying the
training pictures wins nothing. At every number of evaluations both take the best of the same time grids, flow matching
of Euler and Heun too, chosen on pictures of their own by the distance to training pictures. `floor` rows are training
pictures in place of drawn ones. `ratio` rows give IMM's distance over flow matching's (and what KID, near 0 for both,
differs by), with an interval over seeds (Student's t), prompts and real pictures (paired bootstrap).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import arms, harness
from mmgen.training.run import load

SHIFTS = (0.25, 0.5, 1.0, 2.0, 4.0)  # time grids

# What flow matching has apart from the data set's configuration, which is IMM's, and the grids of `--tune`.
SETTINGS: dict[str, dict[str, Any]] = {
    "imm": {},
    "flow_matching": {"modalities.image.time.uniform": 0.0},
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
    copies: int = 4
    """Pictures drawn for each held-out one's caption."""
    runs: Path = Path("runs/headline")
    """Where runs are kept; one that is there is continued, or taken as it is."""
    workers: int = 2
    """Runs trained and scored side by side, with a thread each."""
    tune: bool = False
    """Train every setting of both grids with a seed of its own instead, and show each one's distances."""


def measure(arguments: Arguments) -> list[harness.Row]:
    config = arms.prepare(arguments.data)
    steps = 20 if arguments.quick else arguments.train_steps or config.train.steps
    lengths = {"imm": steps, "flow_matching": round(steps * arms.cost_ratio(config))}
    runs = _tuning_runs(arguments, lengths) if arguments.tune else _runs(arguments, lengths)
    arms.train(runs, arguments.workers)
    side = arms.real(arguments.data)  # keeps its features for the processes that score
    scored = _scored(runs, arguments)
    rows: list[harness.Row] = [arms.floor(side, len(side.held_out) * arguments.copies)]
    rows += [score.row for score in scored]
    return rows if arguments.tune else rows + _ratios(scored, arguments)


@dataclass(frozen=True)
class Score:
    """One run at one number of network evaluations: its row, and both distances for every bootstrap draw."""

    run: arms.Run
    steps: int
    row: harness.Row
    draws: Mapping[str, np.ndarray]


def _scored(runs: Sequence[arms.Run], arguments: Arguments) -> list[Score]:
    with arms.side_by_side(arguments.workers) as pool:
        return [score for scores in pool.map(partial(_score, arguments), runs) for score in scores]


def _score(arguments: Arguments, run: arms.Run) -> list[Score]:
    side, sampler, scores = arms.real(arguments.data), load(run.folder), []
    for steps in arguments.steps:
        drawn = arms.draw(sampler, arms.plans(run.objective, steps, SHIFTS), side, arguments.copies, run.seed)
        row = {
            "objective": run.objective,
            "steps": steps,
            "seed": run.seed,
            **drawn.row,
            "solver": drawn.plan.solver,
            "shift": drawn.plan.shift,
            "train_steps": run.steps,
            **{key: str(value) for key, value in run.settings.items()},
        }
        draws = {} if arguments.tune else arms.resampled(drawn.features, side.features, run.seed)
        scores.append(Score(run, steps, row, draws))
    return scores


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


def _ratios(scored: Sequence[Score], arguments: Arguments) -> list[harness.Row]:
    """IMM at N over flow matching at every N', and the step ratio: how many steps flow matching needs, over N."""
    draws = {(score.run.objective, score.steps, score.run.seed): score.draws for score in scored}

    def values(objective: str, steps: int, metric: str) -> np.ndarray:
        return np.stack([draws[objective, steps, seed][metric] for seed in range(arguments.seeds)], axis=1)

    rows: list[harness.Row] = []
    for steps in arguments.steps:
        imm = {metric: values("imm", steps, metric) for metric in ("frechet", "kid")}
        reached, compared = {}, {}
        for other in arguments.steps:
            flow = {metric: values("flow_matching", other, metric) for metric in imm}
            compared[other] = {f"{metric}_ratio": arms.ratio(imm[metric], flow[metric]) for metric in imm}
            compared[other]["kid_difference"] = arms.difference(imm["kid"], flow["kid"])
            for metric in imm:
                if imm[metric][0].mean() <= flow[metric][0].mean():
                    reached[f"step_ratio_{metric}"] = other / steps
        for other, estimates in compared.items():
            rows.append(
                {
                    "objective": "ratio",
                    "steps": steps,
                    "flow_matching_steps": other,
                    **estimates,
                    **{f"step_ratio_{metric}": reached.get(f"step_ratio_{metric}", 0.0) for metric in imm},
                }
            )
    return rows


if __name__ == "__main__":
    harness.run("headline", Arguments, measure, __doc__)
