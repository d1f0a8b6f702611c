"""`mmgen evaluate RUN`: how good, how right and how new what a run draws and says is, with intervals."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from mmgen.cli.arguments import parse
from mmgen.cli.tables import print_line, show
from mmgen.data.source import SourceConfig
from mmgen.evaluation.evaluate import EvaluateConfig, Evaluation, Row, evaluate
from mmgen.evaluation.intervals import Estimate
from mmgen.files import write_text
from mmgen.sampling.sampler import SamplingPrecision
from mmgen.training.run import load, load_run_config, run_folder

RESULT = "evaluation.json"
LEGEND = """\
real: floor of distances, ceiling of shares; codec: the real pictures, encoded and decoded.
own nearest: of the prompts' real pictures the prompt's own is nearest to what was drawn for it.
concept nearest: the nearest real picture of any other style shows the prompt's concept.
name nearest: of all concepts' names the prompt's fits the picture best.
copies: nearer to training than 95 % of held-out pictures; 5 % is what new pictures score."""

# figure -> what the table calls it, and whether it is a share
FIGURES = {
    "kid_lite0": ("KID-lite0", False),
    "fd_lite0": ("FD-lite0", False),
    "own_latent": ("own nearest, latents", True),
    "own_lite0": ("own nearest, lite0", True),
    "concept_lite0": ("concept nearest, lite0", True),
    "concept_text": ("name nearest", True),
    "copies_lite0": ("copies, lite0", True),
    "copies_pixels": ("copies, pixels", True),
    "bits_per_byte": ("bits per byte", False),
    "caption_exact": ("caption names it", True),
    "caption_minilm": ("caption means it", True),
    "caption_minilm_ceiling": ("true caption means it", True),
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
    precision: SamplingPrecision = "float32"
    """of matrix products and the cache: float32 or bf16"""


def main(argv: Sequence[str]) -> int:
    args = parse(Evaluate, argv, "mmgen evaluate")
    sampler = load(args.run, args.weights, args.precision)
    folder = run_folder(args.run)
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
    record = {
        "run": str(args.run),
        "weights": args.weights,
        "precision": args.precision,
        "data": args.data,
        **evaluation.to_json(),
    }
    write_text(folder / RESULT, json.dumps(record, indent=1, allow_nan=False) + "\n")
    console = Console()
    for table in tables(evaluation):
        show(console, table)
    if evaluation.rows:
        print_line(console, LEGEND)
    print_line(console, f"Below each value its 95 % interval; written to {folder / RESULT}")
    return 0


def tables(evaluation: Evaluation) -> list[Table]:
    """One table for the pictures of each split, and one for all texts."""
    made = []
    for split in dict.fromkeys(row.split for row in evaluation.rows):
        rows = [row for row in evaluation.rows if row.split == split]
        title = f"{split}: {rows[0].num} prompts, guidance {evaluation.config.guidance:g}"
        table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
        for name in ("", *map(_name, rows)):
            table.add_column(name, justify="right" if name else "left", no_wrap=True)
        for figure in FIGURES:
            if any(figure in row.figures for row in rows):
                table.add_row(FIGURES[figure][0], *(_cell(row.figures.get(figure), figure) for row in rows))
        table.add_row("network evaluations", *(str(row.nfe or "") for row in rows))
        table.add_row(
            "GFLOP a picture", *(f"{row.flops / row.num / 1e9:.3g}" if row.flops else "" for row in rows)
        )
        table.add_row(
            "seconds a picture", *(f"{row.seconds / row.num:.3g}" if row.seconds else "" for row in rows)
        )
        made.append(table)
    if evaluation.text_rows:
        texts = Table(title="texts", box=box.SIMPLE_HEAD, title_justify="left")
        shown = [figure for figure in FIGURES if any(figure in row.figures for row in evaluation.text_rows)]
        for column in ("split", "of"):
            texts.add_column(column)
        for figure in shown:
            texts.add_column(FIGURES[figure][0], justify="right", no_wrap=True)
        for row in evaluation.text_rows:
            texts.add_row(
                row.split, row.source, *(_cell(row.figures.get(figure), figure) for figure in shown)
            )
        made.append(texts)
    return made


def _name(row: Row) -> str:
    return row.source if row.steps is None else f"{row.steps} step{'s' if row.steps > 1 else ''}"


def _cell(estimate: Estimate | None, figure: str) -> str:
    if estimate is None:
        return ""
    low, high = estimate.low, estimate.high
    if FIGURES[figure][1]:
        return f"{estimate.value:.1%}\n[dim]{100 * low:.0f}..{100 * high:.0f}[/dim]"
    digits = 3 if abs(high) < 10 else 0
    return f"{estimate.value:.{digits}f}\n[dim]{low:.{digits}f}..{high:.{digits}f}[/dim]"
