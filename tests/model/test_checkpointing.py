"""Activation checkpointing: the same gradients for less that is kept, and a target pass that is never made again."""

import pytest
import torch
from torch import Tensor

from mmgen.data.pack import PackConfig, Packer
from mmgen.model.trunk import Block, Checkpointing
from mmgen.objectives import IMM, FlowMatching, FlowMatchingConfig, IMMConfig, Objective
from mmgen.objectives.draw import draw_state
from mmgen.training.feed import Feed
from mmgen.training.losses import compute_losses, weighted
from mmgen.training.run import Parts
from tests.parts import documents, modalities, model, tokenizer

MODES: tuple[Checkpointing, ...] = ("none", "selective", "full")


def feed(objective: Objective) -> Feed:
    packer = Packer(PackConfig(1, 256, 256), modalities(), objective.grouping)
    assert packer.add(*documents(8))
    batch = packer.finish()
    return Feed(batch, draw_state(batch, modalities(), objective, 0), None)


def step(objective: Objective, mode: Checkpointing, precision: str, refined: list[int] | None = None):
    """Gradients, and the bytes of what the forward pass kept for the backward one."""
    parts = Parts(tokenizer(), modalities(), model(dtype=torch.float32), objective)
    parts.model.trunk.checkpoint_blocks(mode)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = weighted(parts, compute_losses(parts, feed(objective), precision, torch.device("cpu")))
    loss.backward()
    return [p.grad for p in parts.model.parameters()], sum(kept.values())


@pytest.mark.parametrize("objective", [IMM(IMMConfig(k=4.0)), FlowMatching(FlowMatchingConfig())])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_gradients_are_the_same_and_less_is_kept(objective: Objective, precision: str):
    (plain, all_of_it), *others = (step(objective, mode, precision) for mode in MODES)
    sizes = [all_of_it]
    for gradients, size in others:
        for found, expected in zip(gradients, plain, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
        sizes.append(size)
    assert sizes[2] < 0.7 * sizes[0], f"bytes kept for the backward pass: {sizes}"


@pytest.mark.parametrize("mode", MODES)
def test_the_target_pass_is_made_once(monkeypatch: pytest.MonkeyPatch, mode: Checkpointing):
    """A block refines the state once, and once again where its activations were not kept; the target once."""
    calls = {True: 0, False: 0}
    plain = Block.refine

    def counted(self: Block, *inputs):
        calls[torch.is_grad_enabled()] += 1
        return plain(self, *inputs)

    monkeypatch.setattr(Block, "refine", counted)
    step(IMM(IMMConfig(k=4.0)), mode, "float32")
    layers = model().config.num_layers
    assert calls == {False: layers, True: layers * (1 if mode == "none" else 2)}
