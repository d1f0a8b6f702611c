"""How much of the demo's training goes by without a batch to train on: batches made between the steps, or beside them.

Trains the first steps of `configs/demo.yaml` with each number of `train.workers`, in turns. `data_wait` is the share of
the time that the trainer waited, `speed` the samples a second over those of the first number of workers.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import harness
from mmgen.config import load_yaml
from mmgen.training.run import RunConfig
from mmgen.training.speed import measure_training

WARMUP = 20


@dataclass(frozen=True)
class Arguments(harness.Arguments):
    config: Path = Path("configs/demo.yaml")
    """What is trained."""
    workers: tuple[int, ...] = (0, 1)
    """Processes that make batches."""
    steps: int = 60
    """Of each run, after 20 in which memory is found and workers start."""


def measure(arguments: Arguments) -> list[harness.Row]:
    config = load_yaml(arguments.config, RunConfig)
    rows: list[harness.Row] = []
    speeds: dict[int, list[float]] = {workers: [] for workers in arguments.workers}
    for seed in range(arguments.seeds):
        # what slows the machine for a while should not slow always the same
        for workers in arguments.workers if seed % 2 == 0 else reversed(arguments.workers):
            run = replace(config, seed=seed, train=replace(config.train, workers=workers))
            found = measure_training(run, steps=5 if arguments.quick else arguments.steps, warmup=WARMUP)
            assert found is not None, "one process, which is the first rank"
            speed = found.per_second["samples"]
            speeds[workers].append(speed)
            row = {"data_wait": found.data_wait, "samples_per_second": speed}
            rows.append({"workers": workers, "seed": seed, **row})
    first = speeds[arguments.workers[0]]
    for workers in arguments.workers[1:]:
        ratios = [new / old for new, old in zip(speeds[workers], first, strict=True)]
        rows.append({"workers": workers, "speed": harness.over_seeds(ratios)})
    return rows


if __name__ == "__main__":
    harness.run("data_wait", Arguments, measure, __doc__)
