"""FlexAttention: its tiles are those of the mask, and its outputs dense's. torch has its gradients on a GPU alone."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from mmgen.model.attention import flex, plan_attention
from mmgen.model.attention.rule import allow
from mmgen.model.model import plan_batch
from mmgen.objectives import IMM, IMMConfig
from mmgen.sequence import Layout, move
from mmgen.training.losses import compute_losses
from mmgen.training.run import Parts
from tests.model.packs import padded, random_pack, streams
from tests.model.test_compile import Counter, feed
from tests.parts import modalities, model, tokenizer

CPU = torch.device("cpu")


@pytest.fixture
def uncompiled():
    """The kernel in torch's own slow words: compiling it takes a minute."""
    with torch.compiler.set_stance("force_eager"):
        yield


def tiles_of(queries: Layout, keys: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each tile of the dense mask whether it holds a pair that is allowed, and whether all are."""
    size = flex.TILE
    tiles = allow(queries, keys).unflatten(1, (-1, size)).unflatten(3, (-1, size))
    return tiles.any(4).any(2), tiles.all(4).all(2)


@pytest.mark.parametrize("size", [4, 16, 128])
def test_tiles_are_those_of_the_dense_mask(size: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(flex, "TILE", size)
    full = all_full = 0
    for seed in range(60):
        pack = random_pack(np.random.default_rng(seed), longest=3 * size // 2 + 2)
        for queries, keys in streams(*(padded(layout, size) for layout in pack)):
            some, every = flex.find_tiles(queries, keys)
            expected, whole = tiles_of(queries, keys)
            assert torch.equal(some, expected)
            assert not (every & ~whole).any(), "a tile is full in which a pair is not allowed"
            full, all_full = full + int(every.sum()), all_full + int(whole.sum())
    assert full > 0.9 * all_full


def test_blocks_out_of_order_cost_tiles_and_hide_nothing(monkeypatch: pytest.MonkeyPatch):
    """Names of blocks that a packed batch would not give: tiles may be too many, never too few."""
    monkeypatch.setattr(flex, "TILE", 8)
    more = 0
    for seed in range(40):
        draw = np.random.default_rng(seed)
        context, state = (padded(layout, 8) for layout in random_pack(draw))
        names = torch.from_numpy(draw.permutation(1 + int(max(context.block.max(), state.block.max()))))
        context, state = (
            replace(x, block=torch.where(x.block < 0, x.block, names[x.block.clamp(0)]))
            for x in (context, state)
        )
        for queries, keys in streams(context, state):
            some, every = flex.find_tiles(queries, keys)
            expected, whole = tiles_of(queries, keys)
            assert not (expected & ~some).any() and not (every & ~whole).any()
            more += int((some & ~expected).sum())
    assert more > 0, "no pack is out of order: this test says nothing"


def test_lists_of_tiles_are_the_tiles_in_order_both_ways(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(flex, "TILE", 16)
    context, state = (padded(layout, 16) for layout in random_pack(np.random.default_rng(3)))
    queries, keys = streams(context, state)[1]
    plan = flex.FlexAttention.plan(queries, keys)
    some, every = flex.find_tiles(queries, keys)
    for tiles, by_query, by_key in (
        (some & ~every, plan.partial_keys, plan.partial_queries),
        (every, plan.full_keys, plan.full_queries),
    ):
        for wanted, lists in ((tiles, by_query), (tiles.mT, by_key)):
            for row, column in np.ndindex(*wanted.shape[:2]):
                listed = lists.index[row, 0, column, : lists.num[row, 0, column]]
                assert listed.tolist() == wanted[row, column].nonzero()[:, 0].tolist()


@pytest.mark.parametrize("seed", range(6))
def test_outputs_are_denses(seed: int, uncompiled: None):
    pack = random_pack(np.random.default_rng(seed), longest=90)
    for queries, keys in streams(*(padded(layout, 128) for layout in pack)):
        q = torch.randn(*queries.shape, 4, 8, dtype=torch.float64)
        k, v = torch.randn(2, *keys.shape, 2, 8, dtype=torch.float64)
        # as it comes from a process beside the step
        plan = move(pickle.loads(pickle.dumps(plan_attention(queries, keys, "flex"))), "cpu")
        found, expected = plan(q, k, v), plan_attention(queries, keys, "dense")(q, k, v)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_the_compiled_kernel_is_dense_and_is_compiled_once_a_stream():
    torch.compiler.reset()
    counted = torch._dynamo.utils.counters["stats"]
    counts = []
    for seed in (0, 1, 2):
        pack = random_pack(np.random.default_rng(seed), longest=20)
        for queries, keys in streams(*(padded(layout, 256) for layout in pack)):
            q = torch.randn(*queries.shape, 4, 16)
            k, v = torch.randn(2, *keys.shape, 2, 16)
            found, expected = (plan_attention(queries, keys, each)(q, k, v) for each in ("flex", "dense"))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            counts.append(counted["unique_graphs"])
    assert [count - counts[0] for count in counts] == [0, 1, 1, 1, 1, 1]


def test_other_lengths_are_refused():
    context, _ = random_pack(np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"tiles of 128 tokens: \d+ queries a row are no multiple of it"):
        plan_attention(context, context, "flex")


def test_compiled_blocks_give_the_same_losses_and_compile_nothing_anew():
    """Forward alone; the objective has a target pass, which attends with the same plan."""
    torch.compiler.reset()
    parts = Parts(tokenizer(), modalities(), model(dtype=torch.float32), IMM(IMMConfig(k=4.0)))
    batches = [feed(parts.objective, num) for num in (8, 4, 12, 16)]
    counter, counts = Counter(), []
    with torch.no_grad():
        dense = [compute_losses(parts, each, "float32", CPU) for each in batches]
        parts.model.trunk.compile_blocks(counter)
        for each, expected in zip(batches, dense, strict=True):
            planned = replace(each, attention=plan_batch(each.batch, "flex"))
            for name, loss in compute_losses(parts, planned, "float32", CPU).items():
                torch.testing.assert_close(loss.total, expected[name].total, rtol=1e-4, atol=0)
            counts.append(counter.count)
    assert counts == [1, 2, 2, 2], "another number of instances makes that number a variable, once"
    torch.compiler.reset()
