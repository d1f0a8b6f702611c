"""Attention under the one mask rule: `rule` says who reads whom; every other file is one way to compute it.

A backend takes the layouts of queries and keys and returns a callable (q, k, v) -> output. Keys are what came before
(a context or a cache) followed by the queries' own tokens.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from mmgen.model.attention.dense import DenseAttention
from mmgen.model.attention.runs import RunsAttention
from mmgen.sequence import Layout

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
AttentionBackend = Literal["dense", "runs"]
AttentionChoice = Literal["auto", "dense", "runs"]


def choose_backend(asked: AttentionChoice, device: torch.device) -> AttentionBackend:
    """What `auto` means on a device. Runs are many small products, which cost a GPU more than a mask does."""
    if asked == "auto":
        return "dense" if device.type == "cuda" else "runs"
    return asked


def plan_attention(queries: Layout, keys: Layout, backend: AttentionBackend) -> Attend:
    """The attention of `queries` [B, L] over `keys` [B, P + L], whose last L columns are the queries themselves.

    Returns a callable (q [B, L, H, E], k and v [B, P + L, K, E]) -> [B, L, H, E] with H a multiple of K. Built once
    per batch and shared by all layers.
    """
    if backend == "dense":
        return DenseAttention.plan(queries, keys)
    return RunsAttention.plan(queries, keys)


__all__ = [
    "Attend",
    "AttentionBackend",
    "AttentionChoice",
    "DenseAttention",
    "RunsAttention",
    "choose_backend",
    "plan_attention",
]
