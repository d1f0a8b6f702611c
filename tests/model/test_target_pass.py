"""The target pass: what a second forward would give, in the context already made, and no gradient from it anywhere."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mmgen.data.pack import PackConfig, Packer
from mmgen.model.model import Model, Target, plan_batch
from mmgen.model.trunk import Block
from mmgen.objectives import IMM, IMMConfig
from mmgen.objectives.draw import NoisyState, draw_state
from mmgen.sequence import PAD, Grouping, PackedBatch
from tests.parts import TINY, documents, modalities, model

OBJECTIVE = IMM(IMMConfig(k=5.0))


def inputs() -> tuple[PackedBatch, NoisyState]:
    """Four captions before pictures and four pictures before captions: groups over both, and some padding."""
    packer = Packer(PackConfig(3, 128, 128), modalities(), Grouping(4))
    assert packer.add(*documents(4), *documents(4, "image text"))
    batch = packer.finish()
    return batch, draw_state(batch, modalities(), OBJECTIVE, seed=0)


def student(net: Model, batch: PackedBatch, state: NoisyState, backend="runs"):
    """The forward of flow matching: no target."""
    told = OBJECTIVE.told_target(state.t, state.s)
    return net(batch, state.x, state.t, told, plan_batch(batch, backend))


def both(net: Model, batch: PackedBatch, state: NoisyState, backend="runs"):
    told = OBJECTIVE.told_target(state.t, state.s)
    target = Target(state.x_r, state.r, OBJECTIVE.told_target(state.r, state.s))
    return net(batch, state.x, state.t, told, plan_batch(batch, backend), target)


def naive(net: Model, batch: PackedBatch, state: NoisyState, backend="runs") -> Tensor:
    """A second whole forward, at r: everything computed anew."""
    told = OBJECTIVE.told_target(state.r, state.s)
    return net(batch, state.x_r, state.r, told, plan_batch(batch, backend))[1]["image"]


def loss_of(hidden: Tensor, output: Tensor, batch: PackedBatch) -> Tensor:
    context, states = (stream.layout.document != PAD for stream in (batch.context, batch.state))
    return hidden[context].float().square().mean() + output[states].sin().sum()


def gradients(net: Model, loss: Tensor) -> dict[str, Tensor]:
    net.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def assert_target_is_right(net: Model) -> None:
    """Values of a naive second forward; context, student and gradients as if it were not there."""
    batch, state = inputs()
    of_trunk = []
    hook = net.trunk.register_forward_hook(lambda module, given, made: of_trunk.append(made))
    hidden, outputs, targets = both(net, batch, state)
    hook.remove()
    assert targets is not None
    # nothing is kept for a backward through it either: that would be the memory of a second forward
    assert not of_trunk[0][2].requires_grad
    real = batch.state.layout.document != PAD
    torch.testing.assert_close(targets["image"][real], naive(net, batch, state)[real], rtol=1e-12, atol=1e-12)
    alone_hidden, alone_outputs, none = student(net, batch, state)
    assert none is None
    assert torch.equal(hidden, alone_hidden), "the context does not feel the target pass"
    assert torch.equal(outputs["image"], alone_outputs["image"])
    alone = gradients(net, loss_of(alone_hidden, alone_outputs["image"], batch))
    # the loss of IMM uses the target's values: whatever it does with them, they carry no gradient
    loss = loss_of(hidden, outputs["image"], batch) + 10 * targets["image"].sum()
    found = gradients(net, loss)
    assert not targets["image"].requires_grad
    assert found.keys() == alone.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in alone.items())


@pytest.mark.parametrize("time", ["adaln_single", "adaln", "add"])
@pytest.mark.parametrize("state_ffn", [False, True])
def test_the_target_is_a_second_forwards_and_carries_no_gradient(time: str, state_ffn: bool):
    assert_target_is_right(model(replace(TINY, time=time, state_ffn=state_ffn)))


@pytest.mark.parametrize("backend", ["dense", "runs"])
def test_both_backends_give_the_naive_target(backend: str):
    net = model()
    batch, state = inputs()
    targets = both(net, batch, state, backend)[2]
    assert targets is not None
    real = batch.state.layout.document != PAD
    torch.testing.assert_close(
        targets["image"][real], naive(net, batch, state, backend)[real], rtol=1e-12, atol=1e-12
    )


def reads_the_students_state(self: Block, context, state, ci, si, past, target=None, ti=None):
    context, kv = self.expand(context, ci, past)
    before, state = state, self.refine(state, si, kv)
    with torch.no_grad():
        return context, state, self.refine(before, ti, kv), kv


def reads_its_own_undetached_context(self: Block, context, state, ci, si, past, target=None, ti=None):
    context, kv = self.expand(context, ci, past)
    return context, self.refine(state, si, kv), self.refine(target, ti, kv), kv


def reads_the_context_after_the_block(self: Block, context, state, ci, si, past, target=None, ti=None):
    context, kv = self.expand(context, ci, past)
    state = self.refine(state, si, kv)
    with torch.no_grad():
        return context, state, self.refine(target, ti, self.expand(context, ci, past)[1]), kv


def is_told_the_students_times(self: Block, context, state, ci, si, past, target=None, ti=None):
    context, kv = self.expand(context, ci, past)
    state = self.refine(state, si, kv)
    with torch.no_grad():
        return context, state, self.refine(target, si, kv), kv


def writes_to_the_context(self: Block, context, state, ci, si, past, target=None, ti=None):
    context, kv = self.expand(context, ci, past)
    state = self.refine(state, si, kv)
    with torch.no_grad():
        target = self.refine(target, ti, kv)
    return context + 1e-9 * target.mean(), state, target, kv


@pytest.mark.parametrize(
    "wrong",
    [
        reads_the_students_state,
        reads_its_own_undetached_context,
        reads_the_context_after_the_block,
        is_told_the_students_times,
        writes_to_the_context,
    ],
)
def test_a_wrong_target_pass_would_be_noticed(monkeypatch: pytest.MonkeyPatch, wrong: Callable):
    right = Block.forward

    def forward(self, context, state, ci, si, past, target=None, ti=None):
        given = (self, context, state, ci, si, past, target, ti)
        return wrong(*given) if target is not None else right(*given)

    assert_target_is_right(model())
    monkeypatch.setattr(Block, "forward", forward)
    with pytest.raises(AssertionError):
        assert_target_is_right(model())


def test_under_autocast_the_students_gradient_is_what_it_is_without_a_target():
    """Autocast casts a weight once for all who use it; a cast made without gradient would cut the student's off."""
    net = model(dtype=torch.float32)
    batch, state = inputs()
    found = []
    for run in (student, both):
        with torch.autocast("cpu", torch.bfloat16):
            hidden, outputs, _ = run(net, batch, state)
        found.append(gradients(net, loss_of(hidden, outputs["image"], batch)))
    alone, with_target = found
    assert alone.keys() == with_target.keys()
    assert "trunk.layers.0.self_attn.q_proj.weight" in alone and "embeddings.image.values.weight" in alone
    assert all(torch.equal(with_target[name], tensor) for name, tensor in alone.items())


def test_the_context_is_not_computed_twice(monkeypatch: pytest.MonkeyPatch):
    calls = []
    expand = Block.expand
    monkeypatch.setattr(Block, "expand", lambda self, *given: calls.append(self) or expand(self, *given))
    batch, state = inputs()
    net = model()
    both(net, batch, state)
    assert calls == list(net.trunk.layers)


def test_a_target_pass_runs_where_the_state_stream_is_all_padding():
    """As a rank whose rows hold text alone must, when others gather weights with it."""
    packer = Packer(PackConfig(1, 128, 128), modalities(), Grouping(4))
    assert packer.add(*documents(2, "text"))
    batch = packer.finish()
    state = draw_state(batch, modalities(), OBJECTIVE, seed=0)
    assert state.groups == ()
    _, _, targets = both(model(), batch, state)
    assert targets is not None and targets["image"].isfinite().all()
