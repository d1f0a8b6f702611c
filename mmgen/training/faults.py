"""What is kept of a step that went wrong, so that it can be looked at and made again."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mmgen.data.loader import describe_counts
from mmgen.files import write_text
from mmgen.training.feed import Feed

FAULTS = "faults"


def save_batches(run: Path, step: int, rank: int, feeds: Sequence[Feed], **values: Tensor) -> Path:
    """Writes a rank's batches of step `step` with the noise and times drawn for them, and returns the file.

    `RUN/faults/step-<step>-rank-<rank>.safetensors` has tensors named as the fields of `Feed` are
    (`0.batch.context.ids` of the first batch); the .json beside it has `values`, the source and key of each sample,
    and what the loaders had met.
    """
    path = run / FAULTS / f"step-{step:08d}-rank-{rank}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for number, feed in enumerate(feeds):
        _collect(feed, str(number), tensors)
    beside = path.with_name(f".{path.name}.partial")
    try:
        save_file(tensors, beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    numbers = {name: f"{float(value):.6g}" for name, value in values.items()}  # JSON has no nan
    samples = [list(zip(feed.batch.sources, feed.batch.keys, strict=True)) for feed in feeds]
    described = {"step": step, **numbers, "samples": samples, "data": describe_counts(feeds[-1].treated)}
    write_text(path.with_suffix(".json"), json.dumps(described, indent=1) + "\n")
    return path


def _collect(value: Any, name: str, found: dict[str, Tensor]) -> None:
    if isinstance(value, Tensor):
        found[name] = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _collect(item, f"{name}.{key}", found)
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            _collect(item, f"{name}.{index}", found)
    elif is_dataclass(value):
        for f in fields(value):
            _collect(getattr(value, f.name), f"{name}.{f.name}", found)
