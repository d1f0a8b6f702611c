"""Layouts of random packs, which the backends of attention are compared on."""

import itertools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmgen.model.attention.segments import Segments
from mmgen.sequence import PAD, Layout

Token = tuple[int, int, int, bool]  # document, block, rank, public


def random_pack(draw: np.random.Generator, rows: int = 2, longest: int = 30) -> tuple[Layout, Layout]:
    """Context and state layouts of random documents: text, clean blocks, and noisy copies of some blocks."""
    block = itertools.count()
    context_rows, state_rows = [], []
    document = 0
    for _ in range(rows):
        context: list[Token] = []
        state: list[Token] = []
        for _ in range(draw.integers(1, 5)):
            rank = 0
            for _ in range(draw.integers(1, 5)):
                if draw.random() < 0.5:
                    for _ in range(draw.integers(1, longest)):
                        context.append((document, next(block), rank, True))
                        rank += 1
                else:
                    length = int(draw.integers(1, longest))
                    if draw.random() < 0.7:
                        clean = next(block)
                        context += [(document, clean, rank, True)] * length
                    for _ in range(draw.integers(0, 3)):
                        noisy = next(block)
                        state += [(document, noisy, rank, False)] * length
                    rank += 1
            document += 1
        context_rows.append(context)
        state_rows.append(state)
    return layout_of(context_rows), layout_of(state_rows)


def layout_of(rows: list[list[Token]]) -> Layout:
    length = max(max(map(len, rows)), 1) + 3
    padded = [row + [(PAD, PAD, 0, False)] * (length - len(row)) for row in rows]
    columns = [torch.tensor([[token[i] for token in row] for row in padded]) for i in range(4)]
    return Layout(columns[0], columns[1], columns[2], columns[3].bool())


def padded(layout: Layout, multiple: int) -> Layout:
    """The layout with padding at the end of its rows, up to a multiple of so many tokens."""
    more = -layout.shape[1] % multiple
    integers = ((layout.document, PAD), (layout.block, PAD), (layout.rank, 0), (layout.public, False))
    return Layout(*(F.pad(values, (0, more), value=value) for values, value in integers))


def streams(context: Layout, state: Layout) -> tuple[tuple[Layout, Layout], tuple[Layout, Layout]]:
    """Queries and keys as a step asks for them: context over context, and state over both."""
    return (context, context), (state, Layout.concat([context, state]))


def per_segment(q: Tensor, k: Tensor, v: Tensor, segments: Segments, _: object = None) -> Tensor:
    """What a variable-length kernel computes, one segment after the other."""
    outputs = []
    bounds = zip(segments.query_starts.tolist(), segments.key_starts.tolist(), strict=True)
    for (a, c), (b, d) in itertools.pairwise(bounds):
        ours, keys, values = (x.transpose(0, 1) for x in (q[a:b], k[c:d], v[c:d]))
        mask = torch.ones(b - a, d - c, dtype=torch.bool)
        if segments.causal:
            mask = mask.tril(d - c - (b - a))
        out = F.scaled_dot_product_attention(ours, keys, values, attn_mask=mask, enable_gqa=True)
        outputs.append(out.transpose(0, 1))
    return torch.cat(outputs)
