"""Loops on functions whose answer is known."""

import numpy as np
import pytest
import torch

from mmgen.objectives import Path
from mmgen.rng import keyed_numpy
from mmgen.sampling.loops import draw_token, guided, pushforward, uniform_grid
from mmgen.sampling.plan import Plan


def test_pushforward_of_a_known_velocity_reaches_the_data():
    """With the velocity of one data point the path is straight, so any number of steps lands on it exactly."""
    path = Path()
    data, noise = torch.randn(2, 5, dtype=torch.float64)
    for steps in (1, 3, 8):
        calls = []

        def output(x, t, s, calls=calls):
            calls.append((t, s))
            return (x - data) / t / path.sigma_data

        x = pushforward(output, path.jump, noise, uniform_grid(steps))
        torch.testing.assert_close(x, data, rtol=0, atol=1e-12)
        assert len(calls) == steps
        assert all(t > s for t, s in calls), "from noise to data: t is the source and s the target"


def test_swapped_times_do_not_reach_the_data():
    path = Path()
    data, noise = torch.randn(2, 5, dtype=torch.float64)
    x = pushforward(
        lambda x, t, s: (x - data) / t / path.sigma_data,
        lambda g, x, t, s: path.jump(g, x, s, t),
        noise,
        uniform_grid(4),
    )
    assert (x - data).abs().max() > 0.1


def test_guidance_of_one_makes_no_second_call_and_of_zero_is_the_null():
    def never(x, t, s):
        raise AssertionError("called")

    ones = guided(lambda x, t, s: x + 1, never, 1.0)
    assert ones(torch.zeros(1), 1.0, 0.0) == 1
    mixed = guided(lambda x, t, s: x + 1, lambda x, t, s: x - 1, 3.0)
    assert mixed(torch.zeros(1), 1.0, 0.0) == 5
    assert guided(lambda x, t, s: x + 1, lambda x, t, s: x - 1, 0.0)(torch.zeros(1), 1.0, 0.0) == -1


def test_tokens_follow_the_law_and_the_nucleus():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    draw = keyed_numpy("tokens")
    counts = np.bincount([draw_token(logits, 1.0, 1.0, draw) for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(counts, [0.5, 0.3, 0.15, 0.05], atol=0.03)
    counts = np.bincount([draw_token(logits, 1.0, 0.7, draw) for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(counts, [0.625, 0.375, 0, 0], atol=0.03)
    counts = np.bincount([draw_token(logits, 0.5, 1.0, draw) for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(counts, np.array([0.25, 0.09, 0.0225, 0.0025]) / 0.365, atol=0.03)
    assert draw_token(logits, 0.0, 1.0, draw) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps 0"),
        ({"guidance": -1.0}, "guidance"),
        ({"top_p": 0.0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Plan(**change)
