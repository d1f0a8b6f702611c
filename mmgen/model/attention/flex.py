"""FlexAttention under the rule: a kernel that skips the tiles of the score matrix in which nobody reads anybody.

Which tiles those are follows from the integers at the bounds of tiles and documents; no pair of tokens is looked at.
Lengths stay as they are from batch to batch, so a kernel is compiled once for each stream.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from mmgen.model.attention.rule import reads
from mmgen.sequence import Layout

MOST_KERNELS = 128
TILE = 128  # tokens of a tile's side: what a stream's length is a multiple of


@dataclass(frozen=True)
class TileLists:
    """For each of N tiles of one side, how many of the M tiles of the other it is computed with, and then which."""

    num: Int[Tensor, "B 1 N"]
    index: Int[Tensor, "B 1 N M"]

    @staticmethod
    def of(wanted: Bool[Tensor, "B N M"]) -> "TileLists":
        """Lists of the tiles that are wanted, first of each list and in order; the others follow, and are not read."""
        num = wanted.sum(-1, dtype=torch.int32)
        index = wanted.int().argsort(dim=-1, descending=True, stable=True)
        return TileLists(num[:, None], index.int()[:, None])


@dataclass(frozen=True)
class FlexAttention:
    """Lists of keys are of each tile of queries, lists of queries (for the backward pass) of each tile of keys.

    In a tile that is `full` everybody reads everybody; in one that is `partial` the rule is asked of every pair.
    """

    queries: Layout
    keys: Layout
    partial_keys: TileLists
    full_keys: TileLists
    partial_queries: TileLists
    full_queries: TileLists

    @staticmethod
    def plan(queries: Layout, keys: Layout) -> "FlexAttention":
        """Raises ValueError for a length that is no multiple of 128."""
        for name, layout in (("queries", queries), ("keys", keys)):
            if layout.shape[1] % TILE:
                raise ValueError(
                    f"flex attention computes tiles of {TILE} tokens: {layout.shape[1]} {name} a row are no multiple "
                    "of it; dense attention takes any number"
                )
        some, every = find_tiles(queries, keys)
        partial = some & ~every
        lists = (TileLists.of(tiles) for tiles in (partial, every, partial.mT, every.mT))
        return FlexAttention(queries, keys, *lists)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _attend(self, q, k, v) if torch.compiler.is_compiling() else _compiled()(self, q, k, v)

    def block_mask(self) -> BlockMask:
        """What torch's kernel takes, which cannot be sent between processes as the tensors in it can."""

        def reads_at(row: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return reads(self.queries.take((row, query)), self.keys.take((row, key)))

        lists = (self.partial_keys, self.full_keys, self.partial_queries, self.full_queries)
        return BlockMask(
            (self.queries.shape[1], self.keys.shape[1]),
            *(each for tiles in lists for each in (tiles.num, tiles.index)),
            BLOCK_SIZE=(TILE, TILE),
            mask_mod=reads_at,
        )


def _attend(plan: FlexAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = flex_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        block_mask=plan.block_mask(),
        enable_gqa=q.shape[2] != k.shape[2],
    )
    assert isinstance(out, Tensor)
    return out.transpose(1, 2)


@cache
def _compiled() -> Callable[[FlexAttention, Tensor, Tensor, Tensor], Tensor]:
    """For blocks that are not compiled, since torch's function then computes whole rectangles.

    Not at the top: the compiler takes seconds to import. Every length, dtype and need of gradients has a kernel of its
    own, more than torch allows one function by itself. Past its limit it raises, and computes no rectangles instead.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, MOST_KERNELS)
    return torch.compile(_attend, dynamic=False, fullgraph=True)


@dataclass(frozen=True)
class _Segments:
    """Runs of tokens of one tile that are of one document and all public or all not, by their extremes."""

    tile: np.ndarray
    document: np.ndarray
    public: np.ndarray
    first_block: np.ndarray
    last_block: np.ndarray
    lowest: np.ndarray
    highest: np.ndarray
    """ranks"""
    whole: np.ndarray
    """whether it is all of its tile"""


def find_tiles(queries: Layout, keys: Layout) -> tuple[Bool[Tensor, "B N M"], Bool[Tensor, "B N M"]]:
    """Tiles in which somebody may read somebody, and those of them in which everybody reads everybody.

    Of the first there is none too few, and none too many where the blocks of a stream follow each other in order, as
    those of a packed batch do. Of the second there may be some too few: those in which a block is read with what is
    before it.
    """
    some, every = [], []
    for row in range(queries.shape[0]):
        ours, theirs = _segments(queries, row), _segments(keys, row)
        found = _compare(ours, theirs)
        # segments are in the order of their tiles, each of which has one at least
        starts = [np.flatnonzero(np.diff(each.tile, prepend=-1)) for each in (ours, theirs)]
        reduced = (
            np.logical_or.reduceat(np.logical_or.reduceat(x, starts[0]), starts[1], axis=1) for x in found
        )
        for into, tiles in zip((some, every), reduced, strict=True):
            into.append(torch.from_numpy(tiles))
    return torch.stack(some), torch.stack(every)


def _segments(layout: Layout, row: int) -> _Segments:
    document, block, rank, public = (
        each[row].cpu().numpy() for each in (layout.document, layout.block, layout.rank, layout.public)
    )
    cut = np.ones(len(document), dtype=bool)
    cut[1:] = (np.diff(document) != 0) | (np.diff(public) != 0)
    cut[::TILE] = True
    starts = np.flatnonzero(cut)
    extremes: list[Callable[[Any, Any], np.ndarray]] = [np.minimum.reduceat, np.maximum.reduceat]
    first_block, last_block, lowest, highest = (
        extreme(values, starts) for values in (block, rank) for extreme in extremes
    )
    return _Segments(
        tile=starts // TILE,
        document=document[starts],
        public=public[starts],
        first_block=first_block,
        last_block=last_block,
        lowest=lowest,
        highest=highest,
        whole=np.diff(starts, append=len(document)) == TILE,
    )


def _compare(ours: _Segments, theirs: _Segments) -> tuple[np.ndarray, np.ndarray]:
    """Whether a token of our segment may read one of theirs, and whether both are whole tiles and all read all."""
    query = _Segments(*(values[:, None] for values in vars(ours).values()))
    same_document = query.document == theirs.document
    blocks_meet = (query.first_block <= theirs.last_block) & (theirs.first_block <= query.last_block)
    one_block = (
        blocks_meet & (query.first_block == query.last_block) & (theirs.first_block == theirs.last_block)
    )
    some = (blocks_meet & (query.public == theirs.public)) | (theirs.public & (theirs.lowest < query.highest))
    every = one_block | (theirs.public & (theirs.highest < query.lowest))
    return same_document & some, same_document & every & query.whole & theirs.whole
