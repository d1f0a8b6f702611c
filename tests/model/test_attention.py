"""The mask rule, and runs against the dense reference on random packs."""

import numpy as np
import pytest
import torch

from mmgen.model.attention import runs as runs_module
from mmgen.model.attention.dense import DenseAttention
from mmgen.model.attention.rule import allow
from mmgen.model.attention.runs import RunsAttention
from mmgen.sequence import PAD, Layout
from tests.model.packs import layout_of, random_pack


def test_rule_on_a_document_with_a_picture_between_texts():
    """text, clean picture (2 tokens), text; and a noisy copy of the picture."""
    keys = layout_of(
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
    layout = layout_of([[(0, 0, 0, True), (1, 1, 1, True)]])
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
    cached = layout_of([[(0, b, b, True) for b in range(4)], [(1, b, b, True) for b in range(7)]])
    new = layout_of([[(0, 9, 4, True), (0, 10, 5, True)], [(1, 11, 7, True)]])
    keys = Layout.concat([cached, new])
    real = (new.document != PAD)[..., None, None]
    q = torch.randn(*new.shape, 2, 4, dtype=torch.float64)
    k, v = torch.randn(2, *keys.shape, 2, 4, dtype=torch.float64)
    dense, runs = (backend.plan(new, keys)(q, k, v) * real for backend in (DenseAttention, RunsAttention))
    torch.testing.assert_close(runs, dense, rtol=1e-10, atol=1e-12)


def test_runs_with_no_tokens_at_all():
    empty = layout_of([[]])
    assert RunsAttention.plan(empty, empty)(*torch.randn(3, *empty.shape, 2, 4)).abs().sum() == 0
