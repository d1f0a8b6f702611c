"""`mmgen export RUN OUT`: what sampling needs of a run and nothing else, to ship or to keep."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from mmgen.cli.arguments import parse
from mmgen.config import save_yaml
from mmgen.training.checkpoint import load_model_weights, read_state, save_checkpoint
from mmgen.training.metrics import METRICS
from mmgen.training.run import CHECKPOINTS, CONFIG_NAME, find_checkpoint, load_run_config, run_folder


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
    beside = args.out.with_name(f".{args.out.name}.{os.getpid()}.partial")
    try:
        save_checkpoint(beside / CHECKPOINTS, step, {"ema": weights}, {"step": step})
        save_yaml(replace(load_run_config(run), run=str(args.out)), beside / CONFIG_NAME)
        if (run / METRICS).is_file():
            shutil.copyfile(run / METRICS, beside / METRICS)
        os.replace(beside, args.out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    size = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file())
    print(f"{args.out}: {checkpoint.name}, averaged weights in {args.dtype}, {size / 1e6:.1f} MB")
    return 0
