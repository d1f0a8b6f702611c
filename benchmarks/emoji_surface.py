"""The surface of one checkpoint on captioned emoji: what blocks, steps, guidance, thoughts and candidates buy.

Trains `configs/surface.yaml` (half an hour of two CPU cores; a run that is there is taken as it is) and measures it
by `mmgen tradeoff`: on held-out (concept, style) pairs over all axes, on training prompts over blocks, steps and
guidance, and on prompts that name a group alone ("an animal"), with thoughts of several lengths. Writes `report.html`
of all three beside the run. Rows are the plans whose guidance was chosen, with the figures of the half of the prompts
on which nothing was chosen, and the table of text.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import harness
from mmgen.cli.main import main
from mmgen.cli.tradeoff import SUMMARY
from mmgen.config import load_yaml
from mmgen.evaluation.intervals import Estimate
from mmgen.evaluation.tradeoff import AXES
from mmgen.training.checkpoint import latest_checkpoint
from mmgen.training.run import CHECKPOINTS, RunConfig

CONFIG = Path("configs/surface.yaml")
COSTS = ("nfe", "flops", "seconds", "memory")


@dataclass(frozen=True)
class Arguments(harness.Arguments):
    run: Path = Path("runs/surface")
    """Where the run is kept; one that is finished is taken as it is."""
    blocks: tuple[int, ...] = (1, 2, 4)
    steps: tuple[int, ...] = (1, 2, 4, 8)
    guidance: tuple[float, ...] = (1.0, 2.0)
    thinking: tuple[int, ...] = (0, 12)
    """Of held-out prompts alone."""
    candidates: tuple[int, ...] = (1, 4)
    """Of held-out prompts alone."""
    lengths: tuple[int, ...] = (0, 12, 24)
    """Of thoughts after prompts that name a group alone."""
    num: int = 200
    """Prompts of each split at most."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seeds != 3:
            raise ValueError(
                "seeds: this is of one checkpoint, and its intervals are over prompts; leave it out"
            )


def measure(arguments: Arguments) -> list[harness.Row]:
    _train(arguments)
    steps = ["--steps", *map(str, arguments.steps)]
    blocks = ["--blocks", *map(str, arguments.blocks)]
    thinking = ["--thinking", *map(str, arguments.thinking)]
    candidates = ["--candidates", *map(str, arguments.candidates)]
    shared = ["--guidance", *map(str, arguments.guidance), "--num", str(arguments.num)]
    vague = ["--level", "group", "--steps", "1", "2", "4", "--thinking", *map(str, arguments.lengths)]
    # prompts -> split, folder, axes
    measured = {
        "held-out pairs": ("unseen_pairs", "tradeoff", [*blocks, *steps, *thinking, *candidates]),
        "training": ("seen", "tradeoff-seen", [*blocks, *steps]),
        "groups": ("seen", "tradeoff-group", vague),
    }
    rows: list[harness.Row] = []
    folders = []
    for prompts, (split, name, axes) in measured.items():
        folder = arguments.run / name
        folders.append(str(folder))
        _call("tradeoff", [str(arguments.run), "--split", split, "--out", str(folder), *shared, *axes])
        record = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        rows += [{"prompts": prompts, "real": "floor", "kid_lite0": _estimate(record["floor"])}]
        rows += [{"prompts": prompts, **row} for row in _rows(record)]
    _call("report", [*folders, "--out", str(arguments.run / "report.html")])
    return rows


def _train(arguments: Arguments) -> None:
    steps = 20 if arguments.quick else load_yaml(CONFIG, RunConfig).train.steps
    last = latest_checkpoint(arguments.run / CHECKPOINTS)
    if last is not None and last.name == f"step-{steps:08d}":
        return
    words = [str(CONFIG), "--run", str(arguments.run), "--train.steps", str(steps)]
    _call("train", [*words, "--resume"] if last is not None else words)


def _call(command: str, words: list[str]) -> None:
    if main([command, *words]):
        raise ValueError(f"mmgen {command} failed; it says above why")


def _rows(record: dict[str, Any]) -> Iterator[harness.Row]:
    for row in record["rows"]:
        if row["chosen"]:
            figures = {name: _estimate(found) for name, found in row["reported"].items()}
            yield {**{name: row[name] for name in (*AXES, *COSTS)}, **figures}
    for row in record["text"]:
        yield {name: _estimate(value) if isinstance(value, dict) else value for name, value in row.items()}


def _estimate(found: dict[str, Any]) -> Estimate:
    return Estimate(**found)


if __name__ == "__main__":
    harness.run("emoji_surface", Arguments, measure, __doc__)
