"""A step computes what is said: torch's own count of a real step by part, and pairs counted by the mask itself."""

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from mmgen.data.pack import PackConfig, Packer
from mmgen.modalities import build_modalities
from mmgen.model.attention.rule import allow, count_pairs
from mmgen.model.joint import JointConfig, JointKind
from mmgen.model.model import Model
from mmgen.model.trunk import TrunkConfig
from mmgen.objectives import IMM, FlowMatching, FlowMatchingConfig, IMMConfig, Objective
from mmgen.objectives.draw import draw_state
from mmgen.sampling.predict import ModelFacts
from mmgen.sequence import PAD, Document, Layout
from mmgen.training.feed import Feed, draw_windows
from mmgen.training.flops import StepFlops, Work, muon_flops, recomputed_flops, step_flops
from mmgen.training.losses import Loss, compute_losses, weighted
from mmgen.training.optim import OptimConfig, build_optimizer
from mmgen.training.run import Parts
from tests.parts import TINY, documents, modalities, tokenizer

FLOW, MOMENTS = FlowMatching(FlowMatchingConfig()), IMM(IMMConfig())
CPU = torch.device("cpu")
TRUNKS = {
    "grouped heads": TINY,
    "added times, untied head": replace(TINY, num_layers=1, num_kv_heads=4, time="add", tied=False),
    "modulation of each block": replace(TINY, time="adaln"),
    "own feed-forward, wide": TrunkConfig(48, 3, 6, 3, 16, 40, state_ffn=True, modulation_norm=True),
}


def build(trunk: TrunkConfig, objective: Objective, joint: JointConfig | None = None) -> Parts:
    torch.manual_seed(0)
    mods = modalities()
    return Parts(tokenizer(), mods, Model(trunk, mods, tokenizer().vocab_size, joint), objective, joint)


def pack(parts: Parts, docs: list[Document], config: PackConfig) -> Feed:
    packer = Packer(config, parts.modalities, parts.objective.grouping)
    for start in range(0, len(docs), 4):
        assert packer.add(*docs[start : start + 4])
    batch = packer.finish()
    windows = None if parts.joint is None else draw_windows(batch, parts.joint.share, 0, 0)
    return Feed(batch, draw_state(batch, parts.modalities, parts.objective, 0), None, windows)


def facts_of(parts: Parts) -> ModelFacts:
    return ModelFacts.of(parts.model, parts.modalities, parts.objective)


def losses_of(parts: Parts, feed: Feed) -> dict[str, Loss]:
    return compute_losses(parts, feed, "float32", CPU)


def counted(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops()


def step_of(parts: Parts, feed: Feed) -> tuple[int, int]:
    """Operations forward and backward, by torch's count."""
    kept = []
    forward = counted(lambda: kept.append(weighted(parts, losses_of(parts, feed))))
    return forward, counted(kept[0].backward)


def expected(parts: Parts, feed: Feed) -> StepFlops:
    work = Work.computed(feed.batch, feed.windows)
    return step_flops(facts_of(parts), work, parts.objective.needs_target)


DOCUMENTS = {
    "pictures": lambda: documents(8),
    "blocks and copies": lambda: documents(8, blocks={"counts": [2]}, copies=2),
    "both ways": lambda: [*documents(8), *documents(4, "image text")],
}


@pytest.mark.parametrize("objective", [FLOW, MOMENTS])
@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize("docs", DOCUMENTS)
def test_a_step_is_torchs_own_count(docs: str, trunk: str, objective: Objective) -> None:
    parts = build(TRUNKS[trunk], objective)
    feed = pack(parts, DOCUMENTS[docs](), PackConfig(2, 256, 256))
    said = expected(parts, feed)
    forward, backward = step_of(parts, feed)
    assert said.total == forward + backward
    head = said.text_head / 3
    assert said.context_forward + said.state_forward + said.target + head == forward
    assert (said.target > 0) == (objective is MOMENTS)


@pytest.mark.parametrize("kind", ["independent", "mixture", "hmm", "chain"])
@pytest.mark.parametrize("k", [2, 4])
def test_a_joint_head_is_torchs_own_count(kind: str, k: int) -> None:
    config = JointConfig(cast(JointKind, kind), tokens=k, components=3, rank=8, share=0.5)
    parts = build(TINY, FLOW, config)
    feed = pack(parts, documents(8), PackConfig(2, 128, 128))
    said = expected(parts, feed)
    assert feed.windows is not None and said.joint_head > 0
    assert said.total == sum(step_of(parts, feed))


def test_a_model_of_text_alone_makes_no_gradient_for_its_padding() -> None:
    mods = build_modalities({"text": {}}, tokenizer())
    parts = Parts(tokenizer(), mods, Model(TINY, mods, tokenizer().vocab_size), FLOW)
    feed = pack(parts, documents(4, "text"), PackConfig(1, 128, 128))
    assert expected(parts, feed).total == sum(step_of(parts, feed))


@pytest.mark.parametrize("objective", [FLOW, MOMENTS])
def test_full_checkpointing_adds_the_forward_pass_without_the_target(
    objective: Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = build(TINY, objective)
    feed = pack(parts, documents(8), PackConfig(2, 128, 128))
    before = sum(step_of(parts, feed))
    for block in parts.model.trunk.layers:
        monkeypatch.setattr(
            block,
            "forward",
            lambda *given, plain=block.forward: checkpoint(plain, *given, use_reentrant=False),
        )
    more = sum(step_of(parts, feed)) - before
    assert recomputed_flops(facts_of(parts), Work.computed(feed.batch)) == more > 0


@pytest.mark.parametrize("trunk", TRUNKS)
def test_muon_is_torchs_own_count(trunk: str) -> None:
    parts = build(TRUNKS[trunk], FLOW)
    optimizer = build_optimizer(parts.model, OptimConfig(matrices="muon"))
    muon = next(part for part in optimizer.parts if isinstance(part, torch.optim.Muon))
    shapes = [tuple(p.shape) for group in muon.param_groups for p in group["params"]]
    for parameter in parts.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert muon_flops(shapes) == counted(optimizer.step) > 0


@pytest.mark.parametrize("docs", DOCUMENTS)
def test_attended_pairs_are_those_of_the_mask(docs: str) -> None:
    parts = build(TINY, MOMENTS)
    batch = pack(parts, DOCUMENTS[docs](), PackConfig(3, 256, 256)).batch
    context, state = batch.context.layout, batch.state.layout
    both = Layout.concat([context, state])
    for queries, keys in ((context, context), (state, both), (both, context)):
        real = (queries.document != PAD)[:, :, None] & (keys.document != PAD)[:, None]
        assert count_pairs(queries, keys) == int((allow(queries, keys) & real).sum()) > 0
    attended, computed = Work.attended(batch), Work.computed(batch)
    assert attended.labels == computed.labels and attended.instances == computed.instances
    assert attended.state_pairs < computed.state_pairs / 2 and attended.context < computed.context
    assert computed.context_pairs == 3 * 256**2 and computed.state_pairs == 3 * 256 * 512


def test_an_empty_batch_has_no_pairs() -> None:
    parts = build(TINY, FLOW)
    batch = pack(parts, [], PackConfig(1, 128, 128)).batch
    work = Work.attended(batch)
    assert work.context_pairs == work.state_pairs == work.context == 0
    assert step_flops(facts_of(parts), work, target=False).context_forward == 0
