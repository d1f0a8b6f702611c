"""`mmgen cost RUN`: what plans will cost, before anything is drawn: evaluations, FLOPs, cache, and seconds."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from mmgen.cli.arguments import parse
from mmgen.cli.tables import show
from mmgen.evaluation.tradeoff import AXES, TradeoffConfig
from mmgen.sampling.calibration import Calibration
from mmgen.sampling.predict import predict_pictures
from mmgen.sampling.probes import calibrate
from mmgen.sampling.sampler import SamplingPrecision
from mmgen.training.run import load, run_folder

CALIBRATION = "calibration.json"


@dataclass(frozen=True)
class Cost:
    run: Annotated[str, tyro.conf.Positional]
    """folder of a run, or one of its checkpoints"""
    blocks: tuple[int, ...] = (1,)
    """numbers of autoregressive blocks of a picture"""
    steps: tuple[int, ...] = (1, 2, 4, 8)
    """numbers of refinement steps of a block"""
    guidance: tuple[float, ...] = (1.0, 2.0)
    """1 is none; others cost two network evaluations a step"""
    thinking: tuple[int, ...] = (0,)
    """numbers of tokens that are written before a picture; as many as that are counted"""
    candidates: tuple[int, ...] = (1,)
    """numbers of pictures that are drawn for a prompt, of which one is kept"""
    num: int = 1
    """pictures that are asked for at once"""
    prompt_tokens: int = 8
    """of the text of each prompt"""
    size: tuple[int, int] | None = None
    """height and width of a picture in pixels"""
    precision: SamplingPrecision = "float32"
    """of matrix products and the cache: float32 or bf16; a calibration is of one of them"""
    calibrate: bool = False
    """time some calls on this machine first (a few minutes), to be kept in the run's folder: seconds are shown then"""
    batch_sizes: tuple[int, ...] = (1, 8, 64)
    """of the timed calls; seconds of batches beyond them are less certain"""

    def __post_init__(self) -> None:
        if self.num < 1:
            raise ValueError(f"num {self.num} must be at least 1")
        if self.prompt_tokens < 0:
            raise ValueError(f"prompt_tokens {self.prompt_tokens} must be at least 0 (0 is no prompt)")


def main(argv: Sequence[str]) -> int:
    args = parse(Cost, argv, "mmgen cost")
    sampler = load(args.run, precision=args.precision)
    grid = sampler.image.token_grid(*(args.size or sampler.size))
    device = sampler.model.text_embedding.weight.device
    path = run_folder(args.run) / CALIBRATION
    if args.calibrate:
        calibrate(sampler, args.batch_sizes).save(path)
    calibration = Calibration.load(path, device) if path.is_file() else None
    table = Table(title=f"{args.num} pictures", box=box.SIMPLE_HEAD, title_justify="left")
    axes = {name: getattr(args, name) for name in AXES}
    shown = [name for name in AXES if name in AXES[:3] or len(axes[name]) > 1]
    for name in (*shown, "calls", "GFLOP", "MB", "seconds"):
        table.add_column(name, justify="right")
    for plan in TradeoffConfig(axes).plans(sampler.plan):
        work = predict_pictures(sampler.facts, plan, [args.prompt_tokens] * args.num, grid)
        cost = work.cost
        seconds = f"{calibration.seconds(work):.3g}" if calibration else ""
        where = (f"{getattr(plan, name):g}" for name in shown)
        table.add_row(
            *where, str(cost.nfe), f"{cost.flops / 1e9:.3g}", f"{work.cache_bytes / 1e6:.3g}", seconds
        )
    show(Console(), table)
    if calibration is None:
        print("seconds need a calibration on this machine: --calibrate makes one")
    return 0
