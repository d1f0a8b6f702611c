"""The rule as two calls of a variable-length kernel, without a mask: queries are partitioned into segments.

A segment is a run of text, which reads what precedes it in its document, and itself causally; or a block (clean, or a
noisy instance), which reads what precedes it and all of itself. So its keys are the public tokens below its first rank,
then its own; keys that several segments read are gathered for each. The kernels are in varlen.py, flash.py and
memory_efficient.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from mmgen.sequence import PAD, Layout


@dataclass(frozen=True)
class Segments:
    """G segments of one kind: flat indices of their queries and keys, end to end, and the bounds of each.

    `causal` is bottom-right: the last query of a segment reads all its keys, the one before it all but the last.
    """

    queries: Int[Tensor, "N"]
    keys: Int[Tensor, "M"]
    query_starts: Int[Tensor, "G+1"]
    key_starts: Int[Tensor, "G+1"]
    longest_queries: int
    longest_keys: int
    causal: bool


Kernel = Callable[[Tensor, Tensor, Tensor, Segments, Any], Tensor]
"""(q [N, H, E], k and v [M, K, E], segments, what was prepared for them) -> [N, H, E]"""


@dataclass(frozen=True)
class SegmentAttention:
    """`calls` are segments with what the kernel prepared for them; `inverse[b, l]` is where the output of query l of
    row b stands among theirs, put end to end.
    """

    kernel: Kernel
    calls: tuple[tuple[Segments, Any], ...]
    inverse: Int[Tensor, "B L"]

    @staticmethod
    def plan(
        queries: Layout, keys: Layout, kernel: Kernel, prepare: Callable[[Segments], Any] = lambda _: None
    ) -> "SegmentAttention":
        found = find_segments(queries, keys)
        outputs = torch.cat([segments.queries for segments in found])
        # padding takes an extra row of zeros
        inverse = torch.full((queries.document.numel(),), len(outputs))
        inverse[outputs] = torch.arange(len(outputs))
        calls = tuple((segments, prepare(segments)) for segments in found if len(segments.queries))
        return SegmentAttention(kernel, calls, inverse.view(queries.shape))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flat_q, flat_k, flat_v = (x.flatten(0, 1).flatten(1) for x in (q, k, v))
        outputs = []
        for segments, prepared in self.calls:
            # by `embedding`, whose gradient sums the copies of a key in float32
            own, read, values = (
                F.embedding(index, flat).unflatten(-1, x.shape[-2:])
                for index, flat, x in (
                    (segments.queries, flat_q, q),
                    (segments.keys, flat_k, k),
                    (segments.keys, flat_v, v),
                )
            )
            outputs.append(self.kernel(own, read, values, segments, prepared).flatten(1))
        outputs.append(flat_q.new_zeros(1, flat_q.shape[-1]))
        return F.embedding(self.inverse, torch.cat(outputs)).unflatten(-1, q.shape[-2:])


def find_segments(queries: Layout, keys: Layout) -> tuple[Segments, Segments]:
    """The causal segments and the full ones.

    Blocks of queries stand in one piece, and a document's public tokens in the order of their ranks, as a packed batch
    has them.
    """
    starts, lengths, causal = _cut(queries)
    width, past = keys.shape[1], keys.shape[1] - queries.shape[1]
    row, column = starts // queries.shape[1], starts % queries.shape[1]
    # public keys in the order of rows, documents and ranks: what precedes a segment is a piece of that
    num_ranks, num_documents = (
        1 + max(int(each.max()) for each in pair)
        for pair in ((queries.rank, keys.rank), (queries.document, keys.document))
    )

    def place(row: Tensor, document: Tensor, rank: Tensor) -> Int[Tensor, "N"]:
        return (row * num_documents + document) * num_ranks + rank

    public = (keys.public & (keys.document != PAD)).nonzero(as_tuple=True)
    places, order = place(public[0], keys.document[public], keys.rank[public]).sort(stable=True)
    document, rank = queries.document.flatten()[starts], queries.rank.flatten()[starts]
    first = torch.searchsorted(places, place(row, document, torch.zeros_like(rank)))
    preceding = torch.searchsorted(places, place(row, document, rank)) - first
    # all keys once more after the public ones: a segment's own are a piece of them
    pool = torch.cat([(public[0] * width + public[1])[order], torch.arange(keys.document.numel())])
    own = len(order) + row * width + past + column

    def of(kind: Bool[Tensor, "G"], causal: bool) -> Segments:
        ours = lengths[kind]
        counts = torch.stack([preceding[kind], ours], 1)
        both = _ranges(torch.stack([first[kind], own[kind]], 1).flatten(), counts.flatten())
        theirs = counts.sum(1)
        return Segments(
            queries=_ranges(starts[kind], ours),
            keys=pool[both],
            query_starts=_bounds(ours),
            key_starts=_bounds(theirs),
            longest_queries=int(ours.max()) if len(ours) else 0,
            longest_keys=int(theirs.max()) if len(theirs) else 0,
            causal=causal,
        )

    return of(causal, True), of(~causal, False)


def _cut(queries: Layout) -> tuple[Int[Tensor, "G"], Int[Tensor, "G"], Bool[Tensor, "G"]]:
    """Flat index of the first query of each segment, how many it has, and whether it is a run of text."""
    row = torch.arange(queries.shape[0])[:, None].expand(queries.shape)
    row, document, block, rank, public = (
        each.flatten() for each in (row, queries.document, queries.block, queries.rank, queries.public)
    )
    same_document = (row.diff() == 0) & (document.diff() == 0)
    same_block = same_document & (block.diff() == 0)
    edge = same_block.new_zeros(1)
    text = public & ~torch.cat([edge, same_block]) & ~torch.cat([same_block, edge])  # each a block of its own
    same_text = same_document & text[1:] & text[:-1] & (rank.diff() > 0)
    starts = torch.cat([~edge, ~(same_block | same_text)]).nonzero()[:, 0]
    lengths = torch.diff(starts, append=torch.tensor([len(document)]))
    real = document[starts] != PAD
    return starts[real], lengths[real], text[starts[real]]


def _ranges(starts: Int[Tensor, "G"], lengths: Int[Tensor, "G"]) -> Int[Tensor, "N"]:
    """Ranges of numbers, end to end."""
    offsets = starts - (lengths.cumsum(0) - lengths)
    return offsets.repeat_interleave(lengths) + torch.arange(int(lengths.sum()))


def _bounds(lengths: Int[Tensor, "G"]) -> Int[Tensor, "G+1"]:
    return F.pad(lengths.cumsum(0), (1, 0)).int()
