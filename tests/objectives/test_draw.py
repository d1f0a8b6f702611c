"""Times and noise of groups: shared within a group, exact in tiny gaps, and the same however groups are spread."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from mmgen.data.pack import PackConfig, Packer
from mmgen.modalities import Modality
from mmgen.objectives import IMM, FlowMatching, FlowMatchingConfig, IMMConfig, check_modalities
from mmgen.objectives.draw import NoisyState, draw_state
from mmgen.rng import keyed_numpy
from mmgen.sequence import PAD, Document, Grouping, PackedBatch
from tests.parts import documents, modalities, tokenizer

FOUR = IMM(IMMConfig(k=5.0))


def pack(items: list[Document], rows: int = 2, first_group: int = 100, particles: int = 4) -> PackedBatch:
    packer = Packer(PackConfig(rows, 128, 128), modalities(), Grouping(particles))
    assert packer.add(*items)
    return packer.finish(first_group)


def tokens_of(batch: PackedBatch, index: int) -> torch.Tensor:
    """Which slots of the state stream are of an instance."""
    assert batch.state.instance is not None
    return (batch.state.instance == index) & (batch.state.layout.document != PAD)


def by_particle(batch: PackedBatch, state: NoisyState) -> dict[tuple[int, int], tuple]:
    """(group, particle) -> its times and noise."""
    own = batch.instances
    return {
        (group, particle): (
            *(float(time[i]) for time in (state.t, state.s, state.r)),
            state.noise["image"][tokens_of(batch, i)],
        )
        for i, (group, particle) in enumerate(zip(own.group.tolist(), own.particle.tolist(), strict=True))
    }


def same(a: tuple, b: tuple) -> bool:
    return a[:3] == b[:3] and torch.equal(a[3], b[3])


def test_particles_share_their_times_and_nothing_else():
    batch = pack(documents(8))
    state = draw_state(batch, modalities(), FOUR, seed=0)
    for group in (100, 101):
        members = (batch.instances.group == group).nonzero()[:, 0].tolist()
        assert len(members) == 4
        for time in (state.t, state.s, state.r):
            assert time.dtype == torch.float64
            assert len({float(time[i]) for i in members}) == 1
        noises = torch.stack([state.noise["image"][tokens_of(batch, i)] for i in members])
        assert torch.pdist(noises.flatten(1)).min() > 1
    assert state.t[0] != state.t[batch.instances.group == 101][0]
    assert (state.s <= state.r).all() and (state.r <= state.t).all() and (state.t < 0.994).all()


def test_x_r_is_the_same_data_and_noise_at_r():
    batch = pack(documents(8))
    state = draw_state(batch, modalities(), FOUR, seed=0)
    for i in range(8):
        here = tokens_of(batch, i)
        x, noise = batch.state.values["image"][here].double(), state.noise["image"][here].double()
        for time, found in ((state.t[i], state.x), (state.r[i], state.x_r)):
            torch.testing.assert_close(
                found["image"][here].double(), (1 - time) * x + time * noise, rtol=0, atol=2e-7
            )


def test_a_tiny_gap_is_not_lost_in_rounding():
    """At k = 20 and t near its end, t - r is 6e-9: the times would be equal in float32, and x_t and x_r with them."""
    batch = pack(documents(8))
    late = IMM(IMMConfig(k=20.0))
    parts = modalities()
    parts["image"].draw_time = lambda draw: 0.9999
    state = draw_state(batch, parts, late, seed=0)
    gap = state.t - state.r
    assert (gap > 0).all() and (gap < 1e-8).all()
    assert torch.equal(state.t.float(), state.r.float())
    assert not torch.equal(state.x["image"], state.x_r["image"])


def test_flow_matching_carries_no_target():
    state = draw_state(
        pack(documents(4), particles=1), modalities(), FlowMatching(FlowMatchingConfig()), seed=0
    )
    assert state.x_r == {} and state.groups == ()


def test_draws_do_not_depend_on_how_groups_lie_in_batches():
    """Two ranks, each with the documents of whole groups and their global numbers, draw what one rank would."""
    whole = pack(documents(8))
    full = by_particle(whole, draw_state(whole, modalities(), FOUR, seed=5))
    items = documents(8)
    for first, mine in ((100, items[0::2]), (101, items[1::2])):
        part = pack(mine, rows=1, first_group=first)
        found = by_particle(part, draw_state(part, modalities(), FOUR, seed=5))
        assert found.keys() == {(first, particle) for particle in range(4)}
        assert all(same(draw, full[key]) for key, draw in found.items())
    other = by_particle(whole, draw_state(whole, modalities(), FOUR, seed=6))
    assert not any(same(other[key], draw) for key, draw in full.items()), "the seed matters"


def test_particles_draw_in_their_order_wherever_they_stand_in_the_batch():
    """The same groups with the batch's instances numbered backwards: the same noise for the same particle."""
    batch = pack(documents(8))
    count = len(batch.instances.group)
    assert batch.state.instance is not None
    turned = replace(
        batch,
        state=replace(batch.state, instance=count - 1 - batch.state.instance),
        instances=replace(
            batch.instances,
            **{
                name: getattr(batch.instances, name).flip(0)
                for name in ("modality", "group", "particle", "num_tokens")
            },
        ),
    )
    expected = by_particle(batch, draw_state(batch, modalities(), FOUR, seed=1))
    found = by_particle(turned, draw_state(turned, modalities(), FOUR, seed=1))
    assert all(same(found[key], draw) for key, draw in expected.items())


def test_groups_name_the_tokens_of_their_particles():
    items = documents(4, copies=2) + documents(4, "image text", copies=2)
    packer = Packer(PackConfig(3, 128, 128), modalities(copies=2), Grouping(4))
    assert packer.add(*items)
    batch = packer.finish(9)
    state = draw_state(batch, modalities(copies=2), FOUR, seed=0)
    (shape,) = state.groups
    assert shape.modality == "image" and shape.slots.shape == (4, 4, 16)
    assert batch.state.instance is not None
    instance = batch.state.instance.flatten()[shape.slots]
    assert instance.eq(instance[..., :1]).all(), "a particle is one instance"
    assert batch.instances.group[instance[..., 0]].tolist() == [[9 + g] * 4 for g in range(4)]
    assert batch.instances.particle[instance[..., 0]].tolist() == [[0, 1, 2, 3]] * 4
    assert torch.equal(batch.instances.group[shape.instance], torch.arange(9, 13))
    real = (batch.state.layout.document != PAD).flatten()
    assert shape.slots.unique().tolist() == real.nonzero()[:, 0].tolist(), "every noisy token, once"


def test_the_schedule_of_k_follows_the_fraction():
    batch = pack(documents(8))
    rising = IMM(IMMConfig(k=4.0, k_final=10.0))
    early, late = (draw_state(batch, modalities(), rising, seed=0, fraction=f) for f in (0.0, 1.0))
    assert torch.equal(early.t, late.t) and torch.equal(early.s, late.s)
    assert (late.r >= early.r).all() and (late.r > early.r).any(), "a finer k, a nearer r"


def test_a_modality_of_another_scale_is_refused():
    parts = modalities()
    check_modalities(FOUR, parts)
    for objective in (IMM(IMMConfig(path=replace(FOUR.path, sigma_data=1.0))), FOUR):
        if objective is FOUR:
            parts["image"].sigma_data = 0.4
        with pytest.raises(ValueError, match=r"modalities\.image: values have the standard deviation 0\.\d"):
            check_modalities(objective, parts)


def test_groups_within_a_picture_need_that_many_copies():
    within = IMM(IMMConfig(grouping="within"))
    check_modalities(within, modalities(copies=8))
    with pytest.raises(ValueError, match=r"modalities\.image: copies 6 must be a multiple .* 4"):
        check_modalities(within, modalities(copies=6))
    with pytest.raises(ValueError, match=r"copies 1 "):
        check_modalities(within, {"pulse": _Pulse("pulse", None, tokenizer())})


@dataclass(frozen=True)
class _Config:
    loss_weight: float = 1.0


class _Pulse(Modality):
    """A continuous modality that says nothing of copies."""

    Config = _Config
    channels = 2

    def encode(self, sample, place, draw):
        return []


def test_noise_is_a_function_of_seed_and_group_alone():
    """The very numbers: times first, then each particle's noise, from the generator of (seed, "state", group)."""
    batch = pack(documents(4))
    state = draw_state(batch, modalities(), FOUR, seed=2)
    draw = keyed_numpy(2, "state", 100)
    times = FOUR.draw_times(modalities()["image"].draw_time, draw)
    assert float(state.t[0]) == times.t and float(state.s[0]) == times.s and float(state.r[0]) == times.r
    for particle in range(4):
        index = int((batch.instances.particle == particle).nonzero()[0])
        expected = draw.standard_normal((16, 48), dtype=np.float32) * np.float32(0.5)
        assert torch.equal(state.noise["image"][tokens_of(batch, index)], torch.from_numpy(expected))
