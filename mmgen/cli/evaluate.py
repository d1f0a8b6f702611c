"""`mmgen evaluate RUN`: how good, how right and how new what a run draws and says is, with intervals."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from mmgen.cli.arguments import parse
from mmgen.data.streams import SourceConfig
from mmgen.evaluation.evaluate import EvaluateConfig, Evaluation, Row, evaluate
from mmgen.evaluation.intervals import Estimate
from mmgen.files import write_text
from mmgen.training.run import CONFIG_NAME, load, load_run_config

RESULT = "evaluation.json"
CAPTION = "real: floor of distances, ceiling of retrieval; codec: the real pictures, encoded and decoded"

# figure -> what the table calls it, and whether it is a share
FIGURES = {
    "kid_lite0": ("KID-lite0 (lower is better)", False),
    "fd_lite0": ("FD-lite0 (lower is better)", False),
    "own_latent": ("retrieval@1: own picture, by latent", True),
    "own_lite0": ("retrieval@1: own picture, by lite0", True),
    "concept_lite0": ("retrieval@1: concept in other styles", True),
    "concept_text": ("retrieval@1: concept's name", True),
    "copies_lite0": ("copies of training, by lite0 (5 % is new)", True),
    "copies_pixels": ("copies of training, by pixels (5 % is new)", True),
    "caption_exact": ("caption names the concept", True),
    "caption_minilm": ("caption means the concept", True),
    "caption_minilm_ceiling": ("  the same for true captions", True),
    "bits_per_byte": ("bits per byte", False),
}


@dataclass(frozen=True)
class Evaluate:
    run: Annotated[Path, tyro.conf.Positional]
    """folder of a run, or one of its checkpoints"""
    steps: tuple[int, ...] = (1, 2, 4, 8)
    """numbers of refinement steps to draw with"""
    guidance: float | None = None
    """1 is none; default: the run's"""
    num: int = 200
    """prompts of each split"""
    seed: int = 0
    """of the noise that pictures start from"""
    split: tuple[str, ...] = ()
    """of the data's splits, where training is called seen; default: all"""
    data: str | None = None
    """folder of another data set; default: what the run was trained on"""
    weights: str = "ema"
    """ema (averaged) or model"""


def main(argv: Sequence[str]) -> int:
    args = parse(Evaluate, argv, "mmgen evaluate")
    sampler = load(args.run, args.weights)
    folder = args.run if (args.run / CONFIG_NAME).is_file() else args.run.parent.parent
    sources = load_run_config(folder).data.sources
    if args.data is not None:
        sources = {Path(args.data).name: SourceConfig(args.data)}
    guidance = sampler.plan.guidance if args.guidance is None else args.guidance
    config = EvaluateConfig(args.steps, guidance, args.num, args.seed, args.split)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()
    ) as bar:
        task = bar.add_task("reading data", total=None)
        evaluation = evaluate(
            sampler,
            sources,
            config,
            lambda what, n, of: bar.update(task, description=what, completed=n, total=of),
        )
    write_text(folder / RESULT, json.dumps(evaluation.to_json(), indent=1) + "\n")
    console = Console(width=None if sys.stdout.isatty() else 120)
    for table in tables(evaluation):
        console.print(table)
    console.print(f"[95 % intervals] written to {folder / RESULT}", markup=False, highlight=False)
    return 0


def tables(evaluation: Evaluation) -> list[Table]:
    """One table for the pictures of each split, and one for all texts."""
    made = []
    for split in dict.fromkeys(row.split for row in evaluation.rows):
        rows = [row for row in evaluation.rows if row.split == split]
        title = f"{split}: {rows[0].num} prompts, guidance {evaluation.config.guidance:g}"
        table = _table(title, [_name(row) for row in rows], [row.figures for row in rows])
        table.add_row("network evaluations", *(str(row.nfe or "") for row in rows))
        table.add_row(
            "GFLOP a picture", *(f"{row.flops / row.num / 1e9:.3g}" if row.flops else "" for row in rows)
        )
        table.add_row(
            "seconds a picture", *(f"{row.seconds / row.num:.3g}" if row.seconds else "" for row in rows)
        )
        table.caption = CAPTION
        made.append(table)
    names = [f"{row.split}: {row.source}" for row in evaluation.text_rows]
    if names:
        made.append(_table("texts", names, [row.figures for row in evaluation.text_rows]))
    return made


def _table(title: str, names: Sequence[str], columns: Sequence) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for figure, (label, is_share) in FIGURES.items():
        if any(figure in column for column in columns):
            table.add_row(label, *(_cell(column.get(figure), is_share) for column in columns))
    return table


def _name(row: Row) -> str:
    return row.source if row.steps is None else f"{row.steps} step{'s' if row.steps > 1 else ''}"


def _cell(estimate: Estimate | None, is_share: bool) -> str:
    if estimate is None:
        return ""
    if is_share:
        return f"{estimate.value:.1%}\n[dim]{100 * estimate.low:.0f} to {100 * estimate.high:.0f}[/dim]"
    digits = 3 if abs(estimate.high) < 10 else 1
    return f"{estimate.value:.{digits}f}\n[dim]{estimate.low:.{digits}f} to {estimate.high:.{digits}f}[/dim]"
