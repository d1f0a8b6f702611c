"""The mask rule. The only place that says which token reads which; every backend is checked against it."""

from jaxtyping import Bool
from torch import Tensor

from mmgen.sequence import Layout


def allow(queries: Layout, keys: Layout) -> Bool[Tensor, "B Q K"]:
    """Whether query q reads key k: both of one document, and k in q's own block or public and of lower rank.

    Padding reads padding, so that no row of the mask is empty and no softmax is NaN; nothing real reads it.
    """
    same_document = queries.document[:, :, None] == keys.document[:, None, :]
    same_block = queries.block[:, :, None] == keys.block[:, None, :]
    earlier = keys.public[:, None, :] & (keys.rank[:, None, :] < queries.rank[:, :, None])
    return same_document & (same_block | earlier)
