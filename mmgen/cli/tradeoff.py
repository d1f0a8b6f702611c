"""`mmgen tradeoff RUN`: what each unit of inference compute buys, over the axes of a plan; resumable."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from mmgen.cli.arguments import parse
from mmgen.cli.tables import print_line, show
from mmgen.config import from_mapping, to_mapping
from mmgen.evaluation.intervals import Estimate
from mmgen.evaluation.policies import policy_rows
from mmgen.evaluation.store import SHOWN, SUMMARY, Store
from mmgen.evaluation.text_surface import describes, sources_of, text_surface
from mmgen.evaluation.tradeoff import (
    AXES,
    FIGURES,
    Judge,
    Measured,
    TradeoffConfig,
    pareto,
    surface,
)
from mmgen.evaluation.verdicts import plan_text
from mmgen.files import write_text
from mmgen.modalities import bands
from mmgen.sampling.plan import Plan
from mmgen.sampling.planner import LOWER_IS_BETTER
from mmgen.sampling.sampler import SamplingPrecision
from mmgen.training.metrics import open_wandb
from mmgen.training.run import RunConfig, find_checkpoint, load, load_run_config, run_folder


@dataclass(frozen=True)
class Tradeoff:
    run: Annotated[Path, tyro.conf.Positional]
    """folder of a run, or one of its checkpoints"""
    blocks: tuple[int, ...] = (1,)
    """numbers of autoregressive blocks of a picture"""
    steps: tuple[int, ...] = (1, 2, 4, 8)
    """numbers of refinement steps of a block"""
    guidance: tuple[float, ...] = (1.0, 2.0, 3.0)
    """1 is none; others cost two network evaluations a step"""
    thinking: tuple[int, ...] = ()
    """numbers of tokens that are written before a picture at most"""
    candidates: tuple[int, ...] = ()
    """numbers of pictures that are drawn for a prompt, of which the scorer's choice is judged"""
    axis: tuple[str, ...] = ()
    """more axes: NAME=VALUE,VALUE with any part of a plan (solver=euler,restart), or with package.module:function,
    which makes a plan of a plan and a value"""
    scorer: str = "auto"
    """judges every picture too, for planners that look at them; auto: likelihood where texts about pictures were
    trained, else none"""
    num: int = 200
    """prompts"""
    split: str | None = None
    """of the data's splits, where training is called seen; default: the first held-out one"""
    level: str = "text"
    """of detail of the captions that are prompts: short ones, such as name or group of the emoji, have many pictures"""
    seed: int = 0
    """of the noise that pictures start from"""
    weights: str = "ema"
    """ema (averaged) or model"""
    precision: SamplingPrecision = "float32"
    """of matrix products and the cache: float32 or bf16"""
    out: Path | None = None
    """folder of what was measured; default: tradeoff in the run's; plans that are in it are not measured again"""


def main(argv: Sequence[str]) -> int:
    args = parse(Tradeoff, argv, "mmgen tradeoff")
    sampler = load(args.run, args.weights, args.precision)
    run = run_folder(args.run)
    run_config = load_run_config(run)
    tasks = list(run_config.data.compose.tasks)
    scorer = args.scorer
    if scorer == "auto":
        scorer = "likelihood" if describes(tasks) else "none"
    config = TradeoffConfig(
        _axes(args), args.num, args.split, args.seed, None if scorer == "none" else scorer, args.level
    )
    plans = config.plans(sampler.plan)
    rows_of_tokens = sampler.image.token_grid(*sampler.size)
    for plan in plans:
        bands(*rows_of_tokens, plan.blocks)  # before hours of drawing
    judge = Judge(sampler, run_config.data.sources, config)
    header = {
        "checkpoint": find_checkpoint(args.run).name,
        "weights": args.weights,
        "precision": args.precision,
        "split": judge.split,
        "num": len(judge.chosen),
        "seed": args.seed,
        "scorer": scorer,
        "level": args.level,
    }
    store = Store(args.out or run / "tradeoff", header, [real.key for real in judge.chosen])
    store.keep_real(judge.features)
    pictures = [real.picture for real in judge.chosen]
    sources = sources_of(tasks, pictures, judge.prompts)
    with _Shown(len(plans), len(judge.chosen)) as shown:
        for plan in plans:
            if plan not in store.found:
                store.add(*judge.measure(sampler, plan, args.seed, shown.drawn))
            shown.measured(store.found[plan])
        timed = store.timed(sampler, judge, plans, args.seed, shown.counter("seconds"))
        text = store.texts(
            sampler, lambda: text_surface(sampler, sources, judge.prompts, args.seed, shown.counter("text"))
        )
    rows = surface(judge, timed)
    floor = judge.floor()
    about = {**header, "run": str(args.run), "floor": asdict(floor), "prompts": judge.prompts[:SHOWN]}
    policies: list[dict[str, Any]] = []
    if config.scorer is not None:
        figures = [name for name in FIGURES if name in rows[0]["choosing"] and name != "copies_lite0"]
        policies = policy_rows(judge, timed, config.scorer, figures)
    ceilings = {name: asdict(estimate) for name, estimate in judge.ceilings().items()}
    record = {**about, "ceilings": ceilings, "rows": [_plain(row) for row in rows]}
    record |= {"policies": [_plain(row) for row in policies], "text": text}
    write_text(store.folder / SUMMARY, json.dumps(record, indent=1, allow_nan=False) + "\n")
    if run_config.log.wandb_project:
        _log(run, run_config, rows)
    console = Console()
    show(console, _table(rows, judge, floor, sampler.model.text_embedding.weight.is_cuda))
    show(console, _text_table(text))
    print_line(
        console,
        "calls: of the network, a picture; guidance: of each line the one with the least KID on one half of the "
        "prompts; figures: on the other half, "
        f"with 95 % intervals. *: no cheaper line is better. All plans: {store.folder / SUMMARY}",
    )
    return 0


def _axes(args: Tradeoff) -> dict[str, tuple[Any, ...]]:
    """Axes by name, with the values of each as the plan has them."""
    axes: dict[str, tuple[Any, ...]] = {"blocks": args.blocks, "steps": args.steps, "guidance": args.guidance}
    axes |= {name: values for name in ("thinking", "candidates") if (values := getattr(args, name))}
    for word in args.axis:
        name, equals, values = word.partition("=")
        if not equals or not values:
            raise ValueError(f"--axis {word!r} must be NAME=VALUE,VALUE, such as shift=0.5,1")
        read = [yaml.safe_load(value) for value in values.split(",")]
        if ":" not in name:
            for value in read:
                from_mapping({name: value}, Plan)  # says what is wrong with it
        axes[name] = tuple(read)
    return axes


class _Shown:
    """How far it is: a bar on a terminal, else a line for each plan."""

    def __init__(self, num_plans: int, num_prompts: int) -> None:
        self.on_terminal = sys.stderr.isatty()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        self.bar = Progress(*columns, console=console, transient=True, disable=not self.on_terminal)
        self.num_plans, self.num_prompts = num_plans, num_prompts
        self._done = 0

    def __enter__(self) -> "_Shown":
        self.bar.start()
        self._task = self.bar.add_task("pictures", total=self.num_plans * self.num_prompts)
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def drawn(self, num: int) -> None:
        """So many pictures of the plan that is being measured."""
        self.bar.update(self._task, completed=self._done * self.num_prompts + num)

    def measured(self, plan: Measured) -> None:
        self._done += 1
        self.drawn(0)
        if not self.on_terminal:
            of = plan_text({name: getattr(plan.plan, name) for name in AXES})
            print(f"plan {self._done} of {self.num_plans}: {of}", file=sys.stderr, flush=True)

    def counter(self, what: str) -> Callable[[], None]:
        """Counts what comes after the plans; shown when it begins."""
        task: list[TaskID] = []

        def count() -> None:
            if not task:
                task.append(self.bar.add_task(what, total=None))
                if not self.on_terminal:
                    print(what, file=sys.stderr, flush=True)
            self.bar.advance(task[0])

        return count


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    def figures(found: Mapping[str, Estimate]) -> dict[str, Any]:
        return {name: asdict(estimate) for name, estimate in found.items()}

    plans = {"plan": asdict(row["plan"])} if "plan" in row else {}
    return {**row, **plans, **{name: figures(row[name]) for name in ("choosing", "reported")}}


def _table(rows: Sequence[Mapping[str, Any]], judge: Judge, floor: Estimate, on_gpu: bool) -> Table:
    title = f"{judge.split}: {len(judge.chosen)} prompts, KID floor {floor:.3f}"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    shown = [name for name in FIGURES if name in rows[0]["reported"]]
    axes = [name for name in AXES if name in AXES[:3] or len({row[name] for row in rows}) > 1]
    for name in (
        *axes,
        "calls",
        "GFLOP",
        "ms",
        "MB" if on_gpu else "cache MB",
        *(FIGURES[name] for name in shown),
    ):
        table.add_column(name, justify="right")
    front = pareto(rows, "flops")
    for row in rows:
        if row["chosen"]:
            mark = "*" if any(row is each for each in front) else ""
            cost = (row["flops"] / 1e9, 1000 * row["seconds"], row["memory"] / 2**20)
            where = [f"{row[name]}{mark if name == 'steps' else ''}" for name in axes]
            figures = (_cell(row["reported"][name], share=name not in LOWER_IS_BETTER) for name in shown)
            table.add_row(*where, str(row["nfe"]), *(f"{each:.3g}" for each in cost), *figures)
    return table


def _log(run: Path, config: RunConfig, rows: Sequence[Mapping[str, Any]]) -> None:
    """The surface as a table of the run's own page at wandb: plans, costs and figures on the half that reports."""
    import wandb

    shown = [name for name in FIGURES if name in rows[0]["reported"]]
    costs = ("nfe", "flops", "seconds", "memory")
    table = wandb.Table(columns=[*AXES, *costs, *shown])
    for row in rows:
        figures = [row["reported"][name].value for name in shown]
        table.add_data(*(row[name] for name in AXES), *(row[name] for name in costs), *figures)
    opened = open_wandb(run, config.log, to_mapping(config))
    opened.log({"surface": table})
    opened.finish()


def _text_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Of rows as they are kept."""
    table = Table(title="texts", box=box.SIMPLE_HEAD, title_justify="left")
    for name in ("of", "tokens a pass", "kept", "tokens/s", "speed", "MFLOP a token", "bits per byte"):
        table.add_column(name, justify="right")
    for row in rows:
        names = ("kept", "tokens_per_second", "speed", "bits_per_byte")
        *figures, bits = (_cell(Estimate(**row[name])) for name in names)
        last = (f"{row['flops_per_token'] / 1e6:.3g}", bits)
        table.add_row(row["source"], str(row["tokens_per_pass"]), *figures, *last)
    return table


def _cell(estimate: Estimate, share: bool = False) -> str:
    low, high = estimate.low, estimate.high
    if share:
        return f"{estimate.value:.0%}\n[dim]{100 * low:.0f}..{100 * high:.0f}[/dim]"
    return f"{estimate.value:.3f}\n[dim]{low:.2f}..{high:.2f}[/dim]"
