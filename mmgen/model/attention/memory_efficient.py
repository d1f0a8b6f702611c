"""xformers' memory-efficient attention on the segments of the rule. It is optional, and imported where it is used."""

from typing import Any

import torch
from torch import Tensor

from mmgen.model.attention.dense import repeat_heads
from mmgen.model.attention.segments import Segments


def prepare(segments: Segments) -> Any:
    """xformers' own description of the segments, made once a batch: it is made from lists."""
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalFromBottomRightMask, BlockDiagonalMask  # pyright: ignore[reportMissingImports]

    kind = BlockDiagonalCausalFromBottomRightMask if segments.causal else BlockDiagonalMask
    lengths = (starts.diff().tolist() for starts in (segments.query_starts, segments.key_starts))
    # a process beside the step must not be the one that touches the GPU first, which is where the default puts them
    return kind.from_seqlens(*lengths, device=torch.device("cpu"))


def attend(q: Tensor, k: Tensor, v: Tensor, _: Segments, prepared: Any) -> Tensor:
    from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]

    k, v = repeat_heads(k, q.shape[-2]), repeat_heads(v, q.shape[-2])
    return memory_efficient_attention(q[None], k[None], v[None], attn_bias=prepared)[0]
