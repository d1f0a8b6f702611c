"""Two streams, two verbs: nothing leaks, and every way to run them gives the same numbers."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from mmgen.data.pack import PackConfig, Packer
from mmgen.model.attention import plan_attention, varlen
from mmgen.model.attention.rule import allow
from mmgen.model.model import Model, plan_batch
from mmgen.model.time import NUM_FREQUENCIES, Modulation, sinusoid
from mmgen.model.trunk import TrunkConfig
from mmgen.objectives import FlowMatching, FlowMatchingConfig
from mmgen.objectives.draw import NoisyState, draw_state
from mmgen.sequence import PAD, Document, Layout, PackedBatch, Stream
from tests.model.packs import per_segment
from tests.parts import TINY, documents, modalities, model


def pack(items: list[Document], rows: int = 2) -> PackedBatch:
    packer = Packer(PackConfig(rows, 128, 128), modalities())
    assert all(packer.add(document) for document in items)
    return packer.finish()


def mixed() -> list[Document]:
    """Captions before pictures, pictures before captions, text alone; three to a row."""
    return documents(2) + documents(2, "image text") + documents(2, "text")


def noisy(batch: PackedBatch) -> NoisyState:
    return draw_state(batch, modalities(), FlowMatching(FlowMatchingConfig()), seed=0)


def run(net: Model, batch: PackedBatch, state: NoisyState, backend="dense") -> tuple[Tensor, Tensor]:
    hidden, outputs, _ = net(batch, state.x, state.t, state.s, plan_batch(batch, backend))
    return hidden, outputs["image"]


@pytest.mark.parametrize("time", ["adaln_single", "adaln", "add"])
@pytest.mark.parametrize("state_ffn", [False, True])
def test_forward_is_expand_then_refine(time: str, state_ffn: bool):
    net = model(replace(TINY, time=time, state_ffn=state_ffn))
    batch = pack(mixed())
    state = noisy(batch)
    attention = plan_batch(batch, "runs")
    hidden, output = run(net, batch, state, "runs")
    alone, kvs = net.expand(batch.context, attention.context)
    refined = net.refine(batch.state, state.x, state.t, state.s, attention.state, kvs)["image"]
    assert torch.equal(hidden, alone)
    assert torch.equal(output, refined)


def test_backends_agree_in_values_and_gradients():
    net = model()
    batch = pack(mixed())
    state = noisy(batch)
    context, states = (stream.layout.document != PAD for stream in (batch.context, batch.state))
    results = []
    for backend in ("dense", "runs"):
        hidden, output = run(net, batch, state, backend)
        loss = hidden[context].square().sum() + output[states].sin().sum()
        results.append(
            [
                hidden[context],
                output[states],
                *torch.autograd.grad(loss, list(net.parameters()), allow_unused=True),
            ]
        )
    for dense, runs in zip(*results, strict=True):
        if dense is not None:
            torch.testing.assert_close(runs, dense, rtol=1e-9, atol=1e-10)


def _perturbed(stream: Stream, row: int, column: int) -> Stream:
    """The stream with one token changed."""
    ids, values = stream.ids.clone(), {name: v.clone() for name, v in stream.values.items()}
    ids[row, column] = (ids[row, column] + 7) % 250
    values["image"][row, column] += 1.0
    return replace(stream, ids=ids, values=values)


@pytest.mark.parametrize("backend", ["dense", "runs", "flex", "varlen"])
@torch.compiler.set_stance("force_eager")  # flex as it is: its compiled kernel is for a GPU
@torch.no_grad()
def test_a_changed_token_changes_exactly_what_may_read_it(backend: str, monkeypatch: pytest.MonkeyPatch):
    """One block deep the rule is the reach; it is transitive, so it stays the reach at any depth."""
    monkeypatch.setattr(
        varlen, "attend", per_segment
    )  # as torch's kernel, which needs a GPU, would compute it
    net = model()
    batch = pack(mixed())
    state = noisy(batch)
    length = batch.context.layout.shape[1]
    both = Layout.concat([batch.context.layout, batch.state.layout])
    reach = allow(both, both)
    real = both.document != PAD
    before = run(net, batch, state, backend)
    for row, column in [(r, c) for r in range(2) for c in real[r].nonzero()[::5, 0].tolist()]:
        changed, changed_state = batch, state
        if column < length:
            changed = replace(batch, context=_perturbed(batch.context, row, column))
        else:
            x = state.x["image"].clone()
            x[row, column - length] += 1.0
            changed_state = replace(state, x={"image": x})
        after = run(net, changed, changed_state, backend)
        moved = torch.cat([(a - b).abs().amax(-1) > 0 for a, b in zip(after, before, strict=True)], 1)
        moved &= real
        expected = torch.zeros_like(moved)
        expected[row] = reach[row, :, column] & real[row]
        assert torch.equal(moved, expected), f"row {row}, token {column}"


def test_no_gradient_flows_from_a_document_to_another():
    net = model()
    batch = pack(mixed())
    state = noisy(batch)
    x = state.x["image"].double().requires_grad_()
    _, output = run(net, batch, replace(state, x={"image": x}), "runs")
    documents_of = batch.state.layout.document
    here = documents_of == documents_of[0, 0]
    (gradient,) = torch.autograd.grad(output[here].sum(), x)
    assert gradient[here].abs().amin(-1).gt(0).all()
    assert gradient[~here].abs().max() == 0


def test_a_rule_that_lets_clean_tokens_see_noise_would_be_noticed():
    """The leak test's control: with noisy tokens public, a picture's noise reaches the tokens after it."""
    batch = pack(documents(2, "image text"), rows=1)
    both = Layout.concat([batch.context.layout, batch.state.layout])
    leaky = replace(both, public=torch.ones_like(both.public))
    assert (allow(leaky, leaky) & ~allow(both, both)).any()


def test_expand_in_pieces_over_a_cache_equals_expand_at_once():
    net = model()
    batch = pack(documents(1, "image text"), rows=1)
    length = int((batch.context.layout.document != PAD).sum())
    whole = _columns(batch.context, 0, length)
    attention = plan_batch(replace(batch, context=whole), "dense")
    expected, _ = net.expand(whole, attention.context)
    # the picture is one block, so no cut may fall inside it: begin and size (3), picture (16), then single tokens
    cuts = [0, 3, 19, *range(20, length + 1)]
    parts, past = [], None
    for a, b in pairwise(cuts):
        part, so_far = _columns(whole, a, b), _columns(whole, 0, b).layout
        hidden, kvs = net.expand(part, plan_attention(part.layout, so_far, "dense"), past)
        past = (
            kvs
            if past is None
            else [
                (torch.cat([pk, k], 1), torch.cat([pv, v], 1))
                for (pk, pv), (k, v) in zip(past, kvs, strict=True)
            ]
        )
        parts.append(hidden)
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-10, atol=1e-11)


def _columns(stream: Stream, a: int, b: int) -> Stream:
    layout = stream.layout
    return Stream(
        stream.modality[:, a:b],
        stream.ids[:, a:b],
        {name: values[:, a:b] for name, values in stream.values.items()},
        stream.positions[:, a:b],
        Layout(layout.document[:, a:b], layout.block[:, a:b], layout.rank[:, a:b], layout.public[:, a:b]),
    )


def test_times_reach_the_output_and_only_through_their_own_instance():
    net = model()
    batch = pack(documents(3), rows=1)
    state = noisy(batch)
    _, before = run(net, batch, state)
    first, real = torch.tensor([0.1, 0, 0]), batch.state.layout.document != PAD
    for changed in (replace(state, t=state.t + first), replace(state, s=state.s - first)):
        _, after = run(net, batch, changed)
        moved = (after - before).abs().amax(-1) > 0
        assert torch.equal(moved & real, (batch.state.instance == 0) & real)


def test_normalised_modulation_is_one_size_whatever_the_weights():
    """Shifts have a root mean square of 1, scales and gates differ from 1 by as much (TVM); zeros stay zeros."""
    torch.manual_seed(0)
    embedding = torch.randn(3, 32)
    base = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 1.0])[:, None]
    for norm in (True, False):
        module = Modulation(32, 2, norm)
        blocks, final = module(embedding)
        assert torch.equal(blocks, base.expand(2, 3, 6, 32)) and torch.equal(final[:, 0], torch.zeros(3, 32))
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        blocks, final = module(embedding)
        sizes = [(blocks - base).square().mean(-1), final[:, :1].square().mean(-1)]
        assert all(bool((size - 1).abs().max() < 1e-3) == norm for size in sizes)


def test_the_time_scale_sets_the_shortest_wave():
    """Times that differ by 2 pi / scale agree in the fastest pair, and by half of that are opposite in it."""
    t = torch.tensor([0.3])
    for scale in (1000.0, 100.0):
        wave = 2 * torch.pi / scale
        at, half, whole = (
            sinusoid(t + shift, scale)[0, [0, NUM_FREQUENCIES]] for shift in (0, wave / 2, wave)
        )
        torch.testing.assert_close(whole, at, rtol=0, atol=1e-3)
        torch.testing.assert_close(half, -at, rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="time_scale 0 must be positive"):
        TrunkConfig(time_scale=0)
