"""What it costs one model to serve every number of blocks: it, at one block, against a model that knows no other.

Both arms train the data set's configuration with every seed at equal FLOPs, by Inductive Moment Matching: `surface`
with the number of autoregressive blocks drawn anew for every picture, few of them most often, `one` with one block
always, for as many more steps as make up for the clean blocks that the other reads. Pictures are then drawn with 1 to 8
steps a block and compared with HELD-OUT real ones. `ratio` rows give the surface model's distance over that of the
other at one block, with an interval over seeds, prompts and real pictures (paired bootstrap).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks import arms, harness
from mmgen.objectives import IMMConfig
from mmgen.sampling.plan import Plan
from mmgen.training.run import load


@dataclass(frozen=True)
class Arguments(harness.Arguments):
    data: arms.DataName = "digits"
    """What is drawn; the data set is built where it is missing."""
    blocks: tuple[int, ...] = (1, 2, 4)
    """Numbers of blocks of the surface model."""
    weights: tuple[float, ...] = (24.0, 3.0, 1.0)
    """How often it is trained on each."""
    steps: tuple[int, ...] = (1, 2, 4, 8)
    """Of a block."""
    train_steps: int | None = None
    """Of the surface model; the configuration's where it is not given."""
    copies: int = 4
    """Pictures drawn for each held-out one's caption."""
    runs: Path = Path("runs/surface_study")
    """Where runs are kept; one that is there is continued, or taken as it is."""
    workers: int = 2
    """Runs trained and scored side by side, with a thread each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if 1 not in self.blocks:
            raise ValueError(f"blocks {self.blocks} must hold 1, at which the two are compared")
        if len(self.weights) != len(self.blocks):
            raise ValueError(f"weights {self.weights} must be one number for each of blocks {self.blocks}")


# Of both arms. At the configuration's rate of 4e-3 the model of many blocks may fail at one step: the bootstrap, in
# which each time learns from the one before it, sees fewer examples of each shape there.
# The floor is the paper's: the configuration's was found for one block.
SETTINGS = {"optim.lr": 2e-3, "objective.floor": IMMConfig.floor}

# (arm, blocks, steps, seed) -> Frechet distance as it is, then of every bootstrap draw
Found = Mapping[tuple[str, int, int, int], np.ndarray]


def measure(arguments: Arguments) -> list[harness.Row]:
    config = arms.prepare(arguments.data)
    steps = 20 if arguments.quick else arguments.train_steps or config.train.steps
    flops = {arm: arms.picture_flops(_run(arm, 0, 1, arguments).config()) for arm in ("surface", "one")}
    lengths = {"surface": steps, "one": round(steps * flops["surface"] / flops["one"])}
    runs = [
        _run(arm, seed, length, arguments)
        for seed in range(arguments.seeds)
        for arm, length in lengths.items()
    ]
    arms.train(runs, arguments.workers)
    side = arms.real(arguments.data)
    rows: list[harness.Row] = [arms.floor(side, len(side.held_out) * arguments.copies)]
    found: dict[tuple[str, int, int, int], np.ndarray] = {}
    with arms.side_by_side(arguments.workers) as pool:
        for scored in pool.map(partial(_scored, arguments), runs):
            for row, draws in scored:
                found[row["arm"], row["blocks"], row["steps"], row["seed"]] = draws
                rows.append(row)
    return rows + _ratios(found, arguments)


def _run(arm: str, seed: int, steps: int, arguments: Arguments) -> arms.Run:
    size = "-quick" if arguments.quick else ""
    blocks = {"counts": arguments.blocks, "weights": arguments.weights}
    several = (
        {f"modalities.image.blocks.{key}": value for key, value in blocks.items()} if arm == "surface" else {}
    )
    often = "-" + "_".join(f"{weight:g}" for weight in arguments.weights) if several else ""
    folder = arguments.runs / f"{arguments.data}-{arm}{often}-{seed}-{steps}{size}"
    return arms.Run(folder, arguments.data, "imm", seed, steps, {**SETTINGS, **several})


def _scored(arguments: Arguments, run: arms.Run) -> list[tuple[harness.Row, np.ndarray]]:
    side, sampler = arms.real(arguments.data), load(run.folder)
    arm = "surface" if run.settings.keys() > SETTINGS.keys() else "one"
    scored = []
    for blocks in arguments.blocks if arm == "surface" else (1,):
        for steps in arguments.steps:
            drawn = arms.draw(sampler, [Plan(blocks, steps)], side, arguments.copies, run.seed)
            name = {"arm": arm, "blocks": blocks, "steps": steps, "seed": run.seed}
            row = {**name, **drawn.row, "train_steps": run.steps}
            scored.append((row, arms.resampled(drawn.features, side.features, run.seed)["frechet"]))
    return scored


def _ratios(found: Found, arguments: Arguments) -> list[harness.Row]:
    """The surface model's distance over that of the one of one block."""

    def values(arm: str, blocks: int, steps: int) -> np.ndarray:
        return np.stack([found[arm, blocks, steps, seed] for seed in range(arguments.seeds)], axis=1)

    return [
        {
            "arm": "ratio",
            "blocks": blocks,
            "steps": steps,
            "ratio": arms.ratio(values("surface", blocks, steps), values("one", 1, steps)),
        }
        for blocks in arguments.blocks
        for steps in arguments.steps
    ]


if __name__ == "__main__":
    harness.run("surface", Arguments, measure, __doc__)
