"""The reference: scaled dot-product attention under the rule as a dense mask. Quadratic; also serves short caches."""

from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor

from mmgen.model.attention.rule import allow
from mmgen.sequence import Layout


def repeat_heads(x: Tensor, num_heads: int) -> Tensor:
    """[..., K, E] -> [..., H, E]: each key/value head serves H / K query heads (grouped-query attention)."""
    return x if x.shape[-2] == num_heads else x.repeat_interleave(num_heads // x.shape[-2], dim=-2)


@dataclass(frozen=True)
class DenseAttention:
    mask: Bool[Tensor, "B 1 Q K"] | None
    """None where all is read"""

    @staticmethod
    def plan(queries: Layout, keys: Layout) -> "DenseAttention":
        mask = allow(queries, keys)[:, None]
        # every layer would apply a mask that hides nothing; a GPU would have to be waited for to know of one
        return DenseAttention(None if mask.device.type == "cpu" and bool(mask.all()) else mask)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = repeat_heads(k, q.shape[-2]), repeat_heads(v, q.shape[-2])
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=self.mask
        )
        return out.transpose(1, 2)
