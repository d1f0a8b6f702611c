"""Activations are what a real step saves for its backward pass, with and without recomputation."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from benchmarks.estimate import Storages
from mmgen.data.pack import PackConfig
from mmgen.model import vocabulary
from mmgen.model.joint import JointConfig, JointKind
from mmgen.model.trunk import TrunkConfig
from mmgen.objectives import Objective
from mmgen.training.flops import Work
from mmgen.training.losses import compute_losses, weighted
from mmgen.training.memory import Checkpointing, Saved, saved_bytes
from mmgen.training.run import Parts
from tests.parts import documents
from tests.training.test_flops import CPU, FLOW, MOMENTS, build, facts_of, pack

SMALL = TrunkConfig(64, 2, 4, 2, 16, 192)
SHAPES = {
    "grouped heads": (SMALL, PackConfig(2, 128, 256)),
    "wide": (TrunkConfig(256, 2, 8, 8, 32, 512), PackConfig(2, 128, 256)),
    "deep": (replace(SMALL, num_layers=6), PackConfig(1, 256, 128)),
    "long": (SMALL, PackConfig(1, 512, 1024)),
    "many short rows": (SMALL, PackConfig(8, 128, 128)),
    "modulation of each block": (replace(SMALL, time="adaln"), PackConfig(2, 128, 256)),
    "added times": (replace(SMALL, time="add"), PackConfig(2, 128, 256)),
}  # fmt: skip


def measure(parts: Parts, docs: list, config: PackConfig, precision: str) -> tuple[int, Saved]:
    """Bytes that a step's forward pass saves, and what is said of them."""
    feed = pack(parts, docs, config)
    storages = Storages()
    with torch.autograd.graph.saved_tensors_hooks(storages.add, lambda tensor: tensor):
        loss = weighted(parts, compute_losses(parts, feed, precision, CPU))
    loss.backward()
    particles = parts.objective.particles if parts.objective.needs_target else 0
    work = Work.attended(feed.batch, feed.windows)
    said = saved_bytes(facts_of(parts), config, work, precision, particles=particles, fused_norms=False)
    return storages.total(parts.model.parameters()), said


@pytest.mark.parametrize("precision", ["bf16", "float32"])
@pytest.mark.parametrize("objective", [FLOW, MOMENTS])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_saves_what_is_said(shape: str, objective: Objective, precision: str) -> None:
    trunk, config = SHAPES[shape]
    found, said = measure(build(trunk, objective), documents(8), config, precision)
    assert said.total == pytest.approx(found, rel=0.02)


def test_logits_that_are_made_in_parts_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, config = build(SMALL, FLOW, JointConfig("chain", tokens=4, share=1.0)), PackConfig(2, 128, 128)
    _, whole = measure(parts, documents(8), config, "float32")
    monkeypatch.setattr(vocabulary, "HELD", 2000)
    found, said = measure(parts, documents(8), config, "float32")
    assert said.total == pytest.approx(found, rel=0.02)
    assert said.total < 0.95 * whole.total, "the tolerance is far below what they take"


@pytest.mark.parametrize("kind", ["independent", "mixture", "hmm", "chain"])
def test_a_joint_head_saves_what_is_said(kind: str) -> None:
    joint = JointConfig(cast(JointKind, kind), tokens=4, components=3, rank=8, share=1.0)
    config = PackConfig(2, 128, 128)
    found, said = measure(build(SMALL, FLOW, joint), documents(8), config, "bf16")
    assert said.total == pytest.approx(found, rel=0.02)
    without, _ = measure(build(SMALL, FLOW), documents(8), config, "bf16")
    assert found > 1.15 * without, "the head is no small part of this"


def test_log_probabilities_of_a_large_vocabulary_are_counted() -> None:
    """A part that is small in the other cases, and the largest of a small model with a language model's vocabulary."""
    parts = build(SMALL, FLOW)
    said = {}
    for size in (1000, 20_000):
        parts.model.text_embedding = nn.Embedding(size, SMALL.width)
        found, said[size] = measure(parts, documents(8), PackConfig(2, 128, 128), "float32")
        assert said[size].total == pytest.approx(found, rel=0.02)
    assert said[20_000].logits > said[20_000].blocks > 5 * said[1000].logits


MADE_BY_PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def recompute(parts: Parts, how: Checkpointing, kept: Storages, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has torch recompute every block, and shows `kept` what is held for it until then."""

    def policy(context: Any, operation: Any, *given: Any, **named: Any) -> CheckpointPolicy:
        # the target pass needs nothing kept: without the last condition its products would be, too
        saves = operation in MADE_BY_PRODUCTS and how == "selective" and torch.is_grad_enabled()
        return CheckpointPolicy.MUST_SAVE if saves else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = []

    def context_fn():
        contexts.append(create_selective_checkpoint_contexts(policy))  # pyright: ignore[reportArgumentType]
        return contexts[-1]

    def forward(plain: Callable, *given: Any):
        for tensor in given:
            if isinstance(tensor, Tensor):
                kept.add(tensor)
        out = checkpoint(plain, *given, use_reentrant=False, context_fn=context_fn)
        for of_one in contexts[-1][0].storage.values():
            for held in tree_leaves(list(of_one.values())):
                if isinstance(value := getattr(held, "val", None), Tensor):
                    kept.add(value)
        return out

    for block in parts.model.trunk.layers:
        monkeypatch.setattr(block, "forward", partial(forward, block.forward))


@pytest.mark.parametrize("precision", ["bf16", "float32"])
@pytest.mark.parametrize("objective", [FLOW, MOMENTS])
@pytest.mark.parametrize("how", ["full", "selective"])
@pytest.mark.parametrize("shape", ["wide", "deep", "long"])
def test_recomputed_blocks_keep_what_is_said(
    shape: str, how: Checkpointing, objective: Objective, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk, config = SHAPES[shape]
    parts = build(trunk, objective)
    feed, kept = pack(parts, documents(8), config), Storages()
    recompute(parts, how, kept, monkeypatch)
    with torch.autograd.graph.saved_tensors_hooks(kept.add, lambda tensor: tensor):
        loss = weighted(parts, compute_losses(parts, feed, precision, CPU))
    loss.backward()
    particles = objective.particles if objective.needs_target else 0
    work = Work.attended(feed.batch)
    said = saved_bytes(facts_of(parts), config, work, precision, how, particles, fused_norms=False)
    found = kept.total(parts.model.parameters())
    assert said.total - said.casts == pytest.approx(found, rel=0.1)
