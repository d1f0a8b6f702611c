"""In which precision a GPU multiplies what autocast leaves alone: matrices of float32."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch


@contextmanager
def float32_products(precision: Literal["highest", "high"]) -> Iterator[None]:
    """Within the context they are exact ("highest"), or on tensor cores ("high"): of TF32, which has ten bits after the
    point, with sums in float32.
    """
    # torch's older switch: it keeps the newer one in step, and not the other way round
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Within the context there is no autocast, and products of float32 are exact."""
    with torch.autocast(device.type, enabled=False), float32_products("highest"):
        yield
