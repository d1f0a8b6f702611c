"""`mmgen export RUN OUT`: what sampling needs of a run and nothing else, to ship or to keep."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from mmgen.cli.arguments import parse
from mmgen.training.checkpoint import load_model_weights, read_state
from mmgen.training.metrics import METRICS
from mmgen.training.run import find_checkpoint, load_run_config, run_folder, write_weights


@dataclass(frozen=True)
class Export:
    run: Annotated[Path, tyro.conf.Positional]
    """folder of a run, or one of its checkpoints"""
    out: Annotated[Path, tyro.conf.Positional]
    """folder to write: again one of a run, which every command but training takes"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """of the averaged weights; float32 is what they were trained in, and twice as large"""


def main(argv: Sequence[str]) -> int:
    args = parse(Export, argv, "mmgen export")
    if args.out.exists():
        raise ValueError(f"{args.out} exists: name a folder that does not")
    checkpoint = find_checkpoint(args.run)
    run, step = run_folder(args.run), read_state(checkpoint)["step"]
    dtype = getattr(torch, args.dtype)
    weights = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in load_model_weights(checkpoint, "ema").items()
    }
    files = [run / METRICS] if (run / METRICS).is_file() else []
    write_weights(args.out, load_run_config(run), step, weights, files)
    size = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file())
    print(f"{args.out}: {checkpoint.name}, averaged weights in {args.dtype}, {size / 1e6:.1f} MB")
    return 0
