"""What to turn when Inductive Moment Matching trains for minutes and not for weeks: one setting at a time.

Every variant differs in one setting from `base`, which is the data set's configuration with the paper's floor, and
trains for equal FLOPs with the same seeds. Rows are one variant, seed and number of network evaluations; `ratio` rows
its Frechet distance over that of `base` with the same seed, the mean over seeds on a log scale with Student's interval.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import arms, harness
from mmgen.evaluation.intervals import Estimate
from mmgen.files import write_text
from mmgen.objectives import IMMConfig
from mmgen.sampling.plan import Plan
from mmgen.training.run import load

Variant = tuple[str, str]
"""factor and value"""

BASE = "base"
# The paper's floor; the configuration has what the study found.
BASE_SETTINGS: dict[str, Any] = {"objective.floor": IMMConfig.floor}
BEGIN = "begin from flow matching"

# Factor -> value -> settings. A batch of twice as many pictures takes half as many steps, and noise draws of one
# picture, which read its caption once, take 7/6.
FACTORS: dict[str, dict[str, dict[str, Any]]] = {
    "k": {
        "6": {"objective.k_final": 6},
        "6 to 10": {"objective.k_final": 10},
        "8": {"objective.k": 8, "objective.k_final": 8},
        "12": {"objective.k": 12, "objective.k_final": 12},
    },
    "gap": {
        "0": {"objective.gap": 0},
        "0.03": {"objective.gap": 0.03},
        "0, and k 12": {"objective.gap": 0, "objective.k": 12, "objective.k_final": 12},
    },
    # Nearly all particles of a group read other captions, which the kernel does not compare: M is then little but how
    # many groups share a (t, s), of which a batch has 64 / M.
    "particles": {
        "1": {"objective.particles": 1},
        "2": {"objective.particles": 2},
        "8": {"objective.particles": 8},
    },
    "groups": {
        "of one caption": {"objective.grouping": "context"},
        "noise draws of one picture": {"objective.grouping": "within", "modalities.image.copies": 4},
    },
    "other captions": {
        "1": {"objective.across_contexts": 1},
        "1, and 2 particles": {"objective.across_contexts": 1, "objective.particles": 2},
        "1, and 8 particles": {"objective.across_contexts": 1, "objective.particles": 8},
    },
    "floor": {"1e-2": {"objective.floor": 1e-2}},
    "pictures a batch": {
        "32": {"data.pack.context_length": 256, "data.pack.state_length": 512},
        "128": {"data.pack.context_length": 1024, "data.pack.state_length": 2048},
    },
    "times t": {
        "uniform": {"modalities.image.time.kind": "uniform"},
        "logit-normal": {"modalities.image.time.uniform": 0},
        "half uniform": {"modalities.image.time.uniform": 0.5},
    },
    "ends": {
        "none": {"objective.from_noise": 0, "objective.to_data": 0},
        "0.1": {"objective.from_noise": 0.1, "objective.to_data": 0.1},
    },
    "time scale": {"20": {"model.time_scale": 20}, "1000": {"model.time_scale": 1000}},
    "times s": {"u^0.5": {"objective.s_power": 0.5}, "u^2": {"objective.s_power": 2}},
    "precision": {"bf16": {"train.precision": "bf16"}},
    "a": {"2": {"objective.a": 2}},
    "b": {"2": {"objective.b": 2}, "5": {"objective.b": 5}},
    "anchors": {
        "0.25": {"objective.anchors": 0.25},
        "0.6": {"objective.anchors": 0.6},
        "0.6 to 0": {"objective.anchors": 0.6, "objective.anchors_final": 0},
    },
    BEGIN: {"a quarter": {}},
    "modulation": {"normalised": {"model.modulation_norm": True}},
    "EMA": {"0.9": {"train.ema_decay": 0.9}, "0.998": {"train.ema_decay": 0.998}},
    "optimizer": {"AdamW": {"optim.matrices": "adamw"}},
    "learning rate": {"2e-3": {"optim.lr": 2e-3}, "8e-3": {"optim.lr": 8e-3}},
    "clipping": {"none": {"optim.grad_clip": 0}},
}
# Value -> length of the run, in the base's steps; what is missing of it at "begin from" went to flow matching.
STEPS_FACTOR = {
    "groups": {"noise draws of one picture": 7 / 6},
    "pictures a batch": {"32": 2.0, "128": 0.5},
    BEGIN: {"a quarter": 0.75},
}


@dataclass(frozen=True)
class Arguments(harness.Arguments):
    data: arms.DataName = "digits"
    """What is drawn."""
    factors: tuple[str, ...] = tuple(FACTORS)
    """Which settings are studied."""
    steps: tuple[int, ...] = (1, 2, 8)
    """Network evaluations of a picture."""
    train_steps: int = 1500
    """Of the configuration's batch; other batches take as many more or fewer."""
    copies: int = 2
    """Pictures drawn for each held-out one's caption."""
    runs: Path = Path("runs/imm_study")
    """Where runs are kept; one that is there is continued, or taken as it is."""
    workers: int = 2
    """Runs trained side by side, with a thread each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := set(self.factors) - set(FACTORS):
            raise ValueError(f"factors {sorted(unknown)} are none of {', '.join(FACTORS)}")


def measure(arguments: Arguments) -> list[harness.Row]:
    config = arms.prepare(arguments.data)
    ratio = arms.cost_ratio(config)
    # what is trained one after the other; the last is scored
    jobs: dict[tuple[Variant, int], list[arms.Run]] = {}
    for seed in range(arguments.seeds):
        for variant, settings in _variants(arguments).items():
            run = _run(variant, settings, seed, arguments)
            jobs[variant, seed] = [run]
            if variant[0] == BEGIN:
                before = round((_steps(arguments) - run.steps) * ratio)
                folder = arguments.runs / f"{arguments.data}-flow_matching-{seed}-{before}"
                first = arms.Run(folder, arguments.data, "flow_matching", seed, before)
                jobs[variant, seed] = [
                    first,
                    replace(run, settings={**settings, "train.begin_from": str(folder)}),
                ]
    with arms.side_by_side(arguments.workers) as pool:
        scored = list(pool.map(partial(_scored, arguments), jobs.values()))
    side = arms.real(arguments.data)
    rows: list[harness.Row] = [arms.floor(side, len(side.held_out) * arguments.copies)]
    found: dict[tuple[Variant, int, int], float] = {}
    for ((variant, seed), runs), by_steps in zip(jobs.items(), scored, strict=True):
        for steps, row in zip(arguments.steps, by_steps, strict=True):
            found[variant, steps, seed] = row["frechet"]
            name = {"factor": variant[0], "value": variant[1], "steps": steps, "seed": seed}
            rows.append({**name, **row, "train_steps": runs[-1].steps})
    return rows + _ratios(found, arguments)


def _scored(arguments: Arguments, runs: Sequence[arms.Run]) -> list[dict[str, Any]]:
    """Figures of the last of `runs` by number of evaluations; kept beside it, so that machines can share a study."""
    run = runs[-1]
    for each in runs:
        arms.check(each)
    path = run.folder.with_suffix(".scores.json")
    kept = json.loads(path.read_text()) if path.is_file() else {}
    key = f"{arguments.copies} copies"
    if missing := [steps for steps in arguments.steps if str(steps) not in kept.get(key, {})]:
        for each in runs:
            arms.train([each], 1)
        side, sampler = arms.real(arguments.data), load(run.folder)
        found = kept.setdefault(key, {})
        for steps in missing:
            row = arms.draw(sampler, [Plan(steps=steps)], side, arguments.copies, run.seed).row
            shares = {name: value.value for name, value in row.items() if isinstance(value, Estimate)}
            found[str(steps)] = {**row, **shares, "processor": harness.machine()["processor"]}
        write_text(path, json.dumps(kept, indent=1) + "\n")
    return [kept[key][str(steps)] for steps in arguments.steps]


def _variants(arguments: Arguments) -> dict[Variant, dict[str, Any]]:
    chosen = {
        (factor, value): settings
        for factor in arguments.factors
        for value, settings in FACTORS[factor].items()
    }
    if arguments.quick:
        chosen = dict(list(chosen.items())[:1])
    return {name: {**BASE_SETTINGS, **settings} for name, settings in {(BASE, ""): {}, **chosen}.items()}


def _run(variant: Variant, settings: Mapping[str, Any], seed: int, arguments: Arguments) -> arms.Run:
    factor, value = variant
    steps = round(_steps(arguments) * STEPS_FACTOR.get(factor, {}).get(value, 1.0))
    name = "-".join(
        "".join(c if c.isalnum() else "_" for c in part) for part in (*variant, str(seed)) if part
    )
    return arms.Run(
        arguments.runs / f"{arguments.data}-{name}-{steps}", arguments.data, "imm", seed, steps, settings
    )


def _steps(arguments: Arguments) -> int:
    return 20 if arguments.quick else arguments.train_steps


def _ratios(found: Mapping[tuple[Variant, int, int], float], arguments: Arguments) -> list[harness.Row]:
    rows = []
    for variant in dict.fromkeys(key[0] for key in found):
        if variant[0] == BASE:
            continue
        for steps in arguments.steps:
            logs = [
                math.log(found[variant, steps, seed] / found[(BASE, ""), steps, seed])
                for seed in range(arguments.seeds)
            ]
            mean = harness.over_seeds(logs)
            ratio = Estimate(math.exp(mean.value), math.exp(mean.low), math.exp(mean.high), mean.num)
            rows.append({"factor": variant[0], "value": variant[1], "steps": steps, "ratio": ratio})
    return rows


if __name__ == "__main__":
    harness.run("imm_study", Arguments, measure, __doc__)
