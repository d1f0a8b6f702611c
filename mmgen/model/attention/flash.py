"""The kernels of flash-attn (github.com/Dao-AILab/flash-attention), version 2 or 3, on the segments of the rule.

Both are optional, and imported where they are first used.
"""

from torch import Tensor

from mmgen.model.attention.segments import Segments


def attend_2(q: Tensor, k: Tensor, v: Tensor, segments: Segments, _: None) -> Tensor:
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    return flash_attn_varlen_func(q, k, v, **_given(segments))


def attend_3(q: Tensor, k: Tensor, v: Tensor, segments: Segments, _: None) -> Tensor:
    from flash_attn_interface import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    out = flash_attn_varlen_func(q, k, v, **_given(segments))
    return out[0] if isinstance(out, tuple) else out  # early ones return the log-sum-exp too


def _given(segments: Segments) -> dict[str, Tensor | int | bool]:
    """Arguments that the two versions call alike. Their `causal` is bottom-right (from 2.1 on)."""
    return {
        "cu_seqlens_q": segments.query_starts,
        "cu_seqlens_k": segments.key_starts,
        "max_seqlen_q": segments.longest_queries,
        "max_seqlen_k": segments.longest_keys,
        "causal": segments.causal,
    }
