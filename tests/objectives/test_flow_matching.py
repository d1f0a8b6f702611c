"""The path, the objective and its draws."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mmgen.data.pack import PackConfig, Packer
from mmgen.objectives import FlowMatching, FlowMatchingConfig, Path
from mmgen.objectives.draw import draw_state
from mmgen.rng import keyed_numpy
from mmgen.sequence import PAD, PackedBatch
from tests.parts import documents, modalities

PATH = Path()


def batch() -> PackedBatch:
    packer = Packer(PackConfig(2, 128, 128), modalities())
    assert all(packer.add(document) for document in documents(4) + documents(2, "image text"))
    return packer.finish(first_group=100)


def test_a_jump_with_the_pairs_own_velocity_follows_the_path():
    x, noise = torch.randn(2, 7, dtype=torch.float64)
    for t, s in ((1.0, 0.0), (0.8, 0.3), (0.5, 0.5)):
        x_t = PATH.add_noise(x, noise, torch.tensor(t))
        x_s = PATH.jump(PATH.target(x, noise, 0.0), x_t, torch.tensor(t), torch.tensor(s))
        torch.testing.assert_close(
            x_s, PATH.add_noise(x, noise, torch.tensor(s, dtype=torch.float64)), rtol=0, atol=1e-7
        )


def test_the_loss_is_zero_at_the_velocity_and_its_minimum_is_the_conditional_mean():
    """At t = 1 the optimum is G = (e - E[x]) / sigma_data for every data set: one Euler step draws the mean."""
    objective = FlowMatching(FlowMatchingConfig())
    x, noise = torch.randn(2, 4000, 1, 3)
    assert objective.token_loss(PATH.target(x, noise, 0.0), x, noise).max() == 0
    best = (noise - x.mean(0)) / PATH.sigma_data
    base = objective.token_loss(best, x, noise).mean()
    for shift in (0.1, -0.1):
        assert objective.token_loss(best + shift, x, noise).mean() > base


def test_the_network_is_told_that_the_target_is_now():
    objective = FlowMatching(FlowMatchingConfig())
    t, s = torch.tensor([0.9]), torch.tensor([0.1])
    assert objective.told_target(t, s) == t
    times = objective.draw_times(lambda draw: 0.25, keyed_numpy(0))
    assert times.t == times.s == 0.25


def test_noise_has_the_scale_of_the_data_and_x_t_lies_on_the_path():
    packed = batch()
    state = draw_state(packed, modalities(), FlowMatching(FlowMatchingConfig()), seed=0)
    real = packed.state.layout.document != PAD
    noise = state.noise["image"][real]
    assert abs(noise.std() - 0.5) < 0.01
    t = state.t[packed.state.instance][..., None].float()
    expected = (1 - t) * packed.state.values["image"] + t * state.noise["image"]
    torch.testing.assert_close(state.x["image"][real], expected[real])
    assert state.noise["image"][~real].abs().max() == 0


def test_a_draw_depends_on_its_group_and_not_on_where_the_group_lies():
    """Two ranks that share a batch draw what one rank would: the second half, with its own group numbers, alone."""
    objective = FlowMatching(FlowMatchingConfig())
    whole = batch()
    full = draw_state(whole, modalities(), objective, seed=5)
    row = 1
    inside = whole.state.instance[row][whole.state.layout.document[row] != PAD].unique()
    if len(inside) == 0:
        row, inside = 0, whole.state.instance[0][whole.state.layout.document[0] != PAD].unique()
    first = int(inside[0])
    part = replace(
        whole,
        state=replace(
            whole.state,
            values={"image": whole.state.values["image"][row : row + 1]},
            instance=(whole.state.instance[row : row + 1] - first).clamp(min=0),
            layout=replace(whole.state.layout, document=whole.state.layout.document[row : row + 1]),
        ),
        instances=replace(
            whole.instances,
            **{
                name: getattr(whole.instances, name)[inside]
                for name in ("modality", "group", "particle", "num_tokens")
            },
        ),
    )
    alone = draw_state(part, modalities(), objective, seed=5)
    real = whole.state.layout.document[row] != PAD
    assert torch.equal(alone.noise["image"][0][real], full.noise["image"][row][real])
    assert torch.equal(alone.t, full.t[inside])
    other = draw_state(whole, modalities(), objective, seed=6)
    assert not torch.equal(other.t, full.t)


@pytest.mark.parametrize("kind", ["uniform", "logit_normal"])
def test_times_follow_the_modalitys_distribution(kind: str):
    image = modalities(time={"kind": kind, "mean": -0.5, "std": 1.0})["image"]
    draw = keyed_numpy("times")
    times = np.array([image.draw_time(draw) for _ in range(4000)])
    assert times.min() >= 0 and times.max() <= 1
    median = 0.5 if kind == "uniform" else 1 / (1 + np.exp(0.5))
    assert abs(np.median(times) - median) < 0.03
