"""How much of the demo's training goes by without a batch to train on: batches made between the steps, or beside them.

Trains the first steps of `configs/demo.yaml` with each number of `train.workers`, in turns. `data_wait` is the share of
the time that the trainer waited, `speed` the samples a second over those of the first number of workers.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

from benchmarks import harness
from mmgen.config import load_yaml
from mmgen.training.metrics import METRICS, LogConfig
from mmgen.training.run import CheckpointConfig, PreviewConfig, RunConfig, ValidationConfig
from mmgen.training.trainer import train

EVERY = 20


@dataclass(frozen=True)
class Arguments(harness.Arguments):
    config: Path = Path("configs/demo.yaml")
    """What is trained."""
    workers: tuple[int, ...] = (0, 1)
    """Processes that make batches."""
    steps: int = 80
    """Of each run; its first 20, in which memory is found and workers start, are not counted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 2 * EVERY:
            raise ValueError(f"steps {self.steps} must be at least {2 * EVERY}")


def measure(arguments: Arguments) -> list[harness.Row]:
    config = load_yaml(arguments.config, RunConfig)
    rows: list[harness.Row] = []
    speeds: dict[int, list[float]] = {workers: [] for workers in arguments.workers}
    for seed in range(arguments.seeds):
        # what slows the machine for a while should not slow always the same
        for workers in arguments.workers if seed % 2 == 0 else reversed(arguments.workers):
            row = _train(config, seed, workers, 2 * EVERY if arguments.quick else arguments.steps)
            speeds[workers].append(row["samples_per_second"])
            rows.append({"workers": workers, "seed": seed, **row})
    first = speeds[arguments.workers[0]]
    for workers in arguments.workers[1:]:
        ratios = [new / old for new, old in zip(speeds[workers], first, strict=True)]
        rows.append({"workers": workers, "speed": harness.over_seeds(ratios)})
    return rows


def _train(config: RunConfig, seed: int, workers: int, steps: int) -> dict[str, float]:
    with TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        train(
            replace(
                config,
                run=str(run),
                seed=seed,
                train=replace(config.train, steps=steps, workers=workers),
                checkpoint=CheckpointConfig(every=steps),
                validation=ValidationConfig(),
                preview=PreviewConfig(),
                log=LogConfig(every=EVERY),
            )
        )
        rows = [json.loads(line) for line in (run / METRICS).read_text().splitlines()][1:]
    return {name: fmean(row[name] for row in rows) for name in ("data_wait", "samples_per_second")}


if __name__ == "__main__":
    harness.run("data_wait", Arguments, measure, __doc__)
