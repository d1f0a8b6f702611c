"""The mask rule. The only place that says which token reads which; every backend is checked against it."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mmgen.sequence import PAD, Layout


def allow(queries: Layout, keys: Layout) -> Bool[Tensor, "B Q K"]:
    """Whether query q reads key k: both of one document, and k in q's own block or public and of lower rank.

    Padding reads padding, so that no row of the mask is empty and no softmax is NaN; nothing real reads it.
    """
    rows, columns = (slice(None), slice(None), None), (slice(None), None, slice(None))
    return reads(queries.take(rows), keys.take(columns))


def reads(query: Layout, key: Layout) -> Bool[Tensor, "..."]:
    """`allow` of tokens whose integers broadcast against each other, or of two tokens."""
    earlier = key.public & (key.rank < query.rank)
    return (query.document == key.document) & ((query.block == key.block) | earlier)


def count_pairs(queries: Layout, keys: Layout) -> int:
    """How many (query, key) pairs the rule allows among real tokens: `allow` summed, padding left out.

    Counted by sorting, so that a training loop can ask it of every batch: no [Q, K] mask is made.
    """
    return _lower_public(queries, keys) + _same_block(queries, keys)


def _lower_public(queries: Layout, keys: Layout) -> int:
    """Pairs of a query and a public key of lower rank in its document."""
    span = 1 + max(int(layout.rank.max()) for layout in (queries, keys))

    def place(layout: Layout, rank: Tensor) -> Int[Tensor, "B L"]:
        return _numbered(layout, layout.document, queries, keys) * span + rank

    real = (keys.document != PAD) & keys.public
    sorted_keys = place(keys, keys.rank)[real].sort().values
    asked = queries.document != PAD
    first = torch.searchsorted(sorted_keys, place(queries, torch.zeros_like(queries.rank))[asked])
    end = torch.searchsorted(sorted_keys, place(queries, queries.rank)[asked])
    return int((end - first).sum())


def _same_block(queries: Layout, keys: Layout) -> int:
    """Pairs of one block, which is of one document and of one rank."""
    ours, theirs = (
        _numbered(each, each.block, queries, keys)[each.document != PAD] for each in (queries, keys)
    )
    size = 1 + max((int(each.max()) for each in (ours, theirs) if len(each)), default=0)
    return int((ours.bincount(minlength=size) * theirs.bincount(minlength=size)).sum())


def _numbered(layout: Layout, own: Tensor, queries: Layout, keys: Layout) -> Int[Tensor, "B L"]:
    """Numbers of a row's documents or blocks that no other row has."""
    span = 2 + max(int(each.max()) for each in (queries.document, keys.document, queries.block, keys.block))
    row = torch.arange(len(own), device=own.device)[:, None]
    return row * span + own + 1
