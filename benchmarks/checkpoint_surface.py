"""The surface of one checkpoint, by `mmgen train`, `mmgen tradeoff` and `mmgen report`: what `emoji_surface` and
`digits_surface` share.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import harness
from mmgen.cli.main import main
from mmgen.config import load_yaml
from mmgen.evaluation.intervals import Estimate
from mmgen.evaluation.store import SUMMARY
from mmgen.evaluation.tradeoff import AXES
from mmgen.training.checkpoint import latest_checkpoint
from mmgen.training.run import CHECKPOINTS, RunConfig

COSTS = ("nfe", "flops", "seconds", "memory")
QUICK_STEPS = 20


class Prompts(NamedTuple):
    """Prompts of one split, and what is asked of `mmgen tradeoff` for them."""

    split: str
    folder: str
    words: Sequence[str]


def train(config: Path, run: Path, quick: bool) -> None:
    """A run that is finished is taken as it is, one that is not goes on."""
    steps = QUICK_STEPS if quick else load_yaml(config, RunConfig).train.steps
    last = latest_checkpoint(run / CHECKPOINTS)
    if last is not None and last.name == f"step-{steps:08d}":
        return
    words = [str(config), "--run", str(run), "--train.steps", str(steps)]
    _call("train", [*words, "--resume"] if last is not None else words)


def measure(run: Path, asked: Mapping[str, Prompts]) -> list[harness.Row]:
    """The plans whose guidance was chosen, with the figures of the half of the prompts on which nothing was chosen, and
    the table of text; `report.html` of all beside the run."""
    rows: list[harness.Row] = []
    folders = []
    for name, prompts in asked.items():
        folder = run / prompts.folder
        folders.append(str(folder))
        _call("tradeoff", [str(run), "--split", prompts.split, "--out", str(folder), *prompts.words])
        record = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        rows += [{"prompts": name, "real": "floor", "kid_lite0": _estimate(record["floor"])}]
        rows += [{"prompts": name, **row} for row in _rows(record)]
    _call("report", [*folders, "--out", str(run / "report.html")])
    return rows


def words(**axes: Sequence[float]) -> list[str]:
    """Options of `mmgen tradeoff`, one for each axis."""
    return [word for name, values in axes.items() for word in (f"--{name}", *map(str, values))]


def refuse_seeds(arguments: harness.Arguments) -> None:
    if arguments.seeds != 3:
        raise ValueError("seeds: this is of one checkpoint, and its intervals are over prompts; leave it out")


def _call(command: str, words: Sequence[str]) -> None:
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
