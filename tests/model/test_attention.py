"""The mask rule, and every backend against the dense reference on random packs."""

import itertools

import numpy as np
import pytest
import torch

from mmgen.model.attention import DenseAttention, RunsAttention
from mmgen.model.attention import runs as runs_module
from mmgen.model.attention.rule import allow
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
    return _layout(context_rows), _layout(state_rows)


def _layout(rows: list[list[Token]]) -> Layout:
    length = max(max(map(len, rows)), 1) + 3
    padded = [row + [(PAD, PAD, 0, False)] * (length - len(row)) for row in rows]
    columns = [torch.tensor([[token[i] for token in row] for row in padded]) for i in range(4)]
    return Layout(columns[0], columns[1], columns[2], columns[3].bool())


def test_rule_on_a_document_with_a_picture_between_texts():
    """text, clean picture (2 tokens), text; and a noisy copy of the picture."""
    keys = _layout(
        [
            [
                (0, 0, 0, True),
                (0, 1, 1, True),
                (0, 1, 1, True),
                (0, 2, 2, True),
                (0, 3, 1, False),
                (0, 3, 1, False),
            ]
        ]
    )
    mask = allow(keys, keys)[0, :6, :6].int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 0, 0, 0, 1, 1],
        [1, 0, 0, 0, 1, 1],
    ]


def test_rule_hides_documents_and_padding():
    layout = _layout([[(0, 0, 0, True), (1, 1, 1, True)]])
    mask = allow(layout, layout)[0]
    assert not mask[1, 0], "a later document reads no earlier one"
    assert not mask[:2, 2:].any(), "nothing real reads padding"
    assert mask.any(-1).all(), "every row reads something"


@pytest.mark.parametrize("seed", range(25))
def test_runs_equal_dense_with_gradients(seed: int, monkeypatch: pytest.MonkeyPatch):
    draw = np.random.default_rng(seed)
    monkeypatch.setattr(runs_module, "RUN", int(draw.integers(4, 40)))
    context, state = random_pack(draw)
    both = Layout.concat([context, state])
    for queries, keys in ((context, context), (state, both)):
        real = (queries.document != PAD)[..., None, None].double()
        if not real.any():
            continue  # a pack without noisy copies: the next test covers it
        shape = (*queries.shape, 4, 8)
        q = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        k, v = (torch.randn(*keys.shape, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
        results = []
        for backend in (DenseAttention, RunsAttention):
            out = backend.plan(queries, keys)(q, k, v) * real
            weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
            results.append((out, *torch.autograd.grad((out * weights).sum(), (q, k, v))))
        for dense, runs in zip(*results, strict=True):
            torch.testing.assert_close(runs, dense, rtol=1e-10, atol=1e-12)


def test_runs_over_a_cache_equal_dense():
    """New tokens over a padded cache: how sampling reads."""
    cached = _layout([[(0, b, b, True) for b in range(4)], [(1, b, b, True) for b in range(7)]])
    new = _layout([[(0, 9, 4, True), (0, 10, 5, True)], [(1, 11, 7, True)]])
    keys = Layout.concat([cached, new])
    real = (new.document != PAD)[..., None, None]
    q = torch.randn(*new.shape, 2, 4, dtype=torch.float64)
    k, v = torch.randn(2, *keys.shape, 2, 4, dtype=torch.float64)
    dense, runs = (backend.plan(new, keys)(q, k, v) * real for backend in (DenseAttention, RunsAttention))
    torch.testing.assert_close(runs, dense, rtol=1e-10, atol=1e-12)


def test_runs_with_no_tokens_at_all():
    empty = _layout([[]])
    assert RunsAttention.plan(empty, empty)(*torch.randn(3, *empty.shape, 2, 4)).abs().sum() == 0
