"""Attention under the one mask rule: `rule` says who reads whom, `choose` which backend a training takes; every other
file is one way to compute it.

A backend takes the layouts of queries and keys and returns a callable (q, k, v) -> output. Keys are what came before
(a context or a cache) followed by the queries' own tokens.
"""

from collections.abc import Callable

from torch import Tensor

from mmgen.model.attention import flash, memory_efficient, varlen
from mmgen.model.attention.choose import AttentionBackend, AttentionChoice, Choice, choose_backend
from mmgen.model.attention.dense import DenseAttention
from mmgen.model.attention.flex import FlexAttention
from mmgen.model.attention.runs import RunsAttention
from mmgen.model.attention.segments import SegmentAttention
from mmgen.sequence import Layout

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def plan_attention(queries: Layout, keys: Layout, backend: AttentionBackend) -> Attend:
    """The attention of `queries` [B, L] over `keys` [B, P + L], whose last L columns are the queries themselves.

    Returns a callable (q [B, L, H, E], k and v [B, P + L, K, E]) -> [B, L, H, E] with H a multiple of K. Built once
    per batch and shared by all layers. All but `dense` are planned on the CPU, and moved to where they compute.
    """
    match backend:
        case "dense":
            return DenseAttention.plan(queries, keys)
        case "runs":
            return RunsAttention.plan(queries, keys)
        case "flex":
            return FlexAttention.plan(queries, keys)
        case "varlen":
            return SegmentAttention.plan(queries, keys, varlen.attend)
        case "flash2":
            return SegmentAttention.plan(queries, keys, flash.attend_2)
        case "flash3":
            return SegmentAttention.plan(queries, keys, flash.attend_3)
        case "xformers":
            return SegmentAttention.plan(queries, keys, memory_efficient.attend, memory_efficient.prepare)


__all__ = ["Attend", "AttentionBackend", "AttentionChoice", "Choice", "choose_backend", "plan_attention"]
