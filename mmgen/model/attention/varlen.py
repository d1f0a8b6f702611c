"""torch's own variable-length kernel (flash attention in 16-bit numbers, on a GPU) on the segments of the rule.

It is imported where it is used, since that takes seconds.
"""

from torch import Tensor

from mmgen.model.attention.segments import Segments


def attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments, _: None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(
        q,
        k,
        v,
        segments.query_starts,
        segments.key_starts,
        segments.longest_queries,
        segments.longest_keys,
        # what torch calls causal, bottom-right; it had another argument for it before 2.12
        window_size=(-1, 0) if segments.causal else (-1, -1),
        enable_gqa=True,
    )
    assert isinstance(out, Tensor)  # nothing beside it was asked for
    return out
