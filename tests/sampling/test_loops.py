"""Loops on functions whose answer is known."""

import math

import numpy as np
import pytest
import torch

from mmgen.objectives import Path
from mmgen.rng import keyed_numpy
from mmgen.sampling.loops import (
    edm_grid,
    guided,
    heun,
    one_by_one,
    pushforward,
    restart,
    shifted,
    tempered,
    through_grid,
    uniform_grid,
)
from mmgen.sampling.plan import Plan

COSINE = Path("vp_cosine", "simple_edm")


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


def test_heun_is_of_second_order_where_euler_is_of_first():
    """Data N(0, d^2) of known flow: x_s = x_t S(s) / S(t), S(t)^2 = (1 - t)^2 d^2 + t^2, sigma_data the noise's."""
    path, d = Path(t_max=1.0), 0.3
    noise = torch.randn(7, dtype=torch.float64) * path.sigma_data
    scale = d * path.sigma_data  # of the data

    def output(x, t, s):
        variance = (1 - t) ** 2 * d**2 + t**2
        return x * (t - (1 - t) * d**2) / variance / path.sigma_data

    exact = noise / path.sigma_data * scale
    errors = {
        solve: [
            (solve(output, path.jump, noise, uniform_grid(steps)) - exact).abs().max().item()
            for steps in (16, 32, 64)
        ]
        for solve in (pushforward, heun)
    }
    euler_gain, heun_gain = (errors[solve][1] / errors[solve][2] for solve in (pushforward, heun))
    assert 1.7 < euler_gain < 2.3 and 3.4 < heun_gain < 4.6
    assert errors[heun][0] < errors[pushforward][1], "better at equal network calls"


def test_heun_makes_two_calls_a_step_at_both_ends():
    calls = []
    heun(lambda x, t, s: calls.append((t, s)) or x, Path().jump, torch.ones(2), [1.0, 0.5, 0.0])
    assert calls == [(1.0, 0.5), (0.5, 0.5), (0.5, 0.0), (0.0, 0.0)]


def test_a_shifted_grid_keeps_its_ends():
    grid = uniform_grid(4)
    assert shifted(grid, 1.0) == grid
    for shift in (0.5, 3.0):
        moved = shifted(grid, shift)
        assert (moved[0], moved[-1]) == (1.0, 0.0) and moved == sorted(moved, reverse=True)
        assert (moved[2] > 0.5) == (shift > 1)
    assert shifted([0.5], 3.0) == [0.75]


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


def test_grids_run_from_noise_to_data_over_the_range_they_are_given():
    assert uniform_grid(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert uniform_grid(2, *Path().time_range) == [0.994, 0.497, 0.0]
    assert uniform_grid(3, 0.006, 0.994)[-1] == 0.006, "exactly"
    for path in (Path(), COSINE, Path(t_min=0.006)):
        t_min, t_max = path.time_range
        for steps in (1, 2, 7):
            times = edm_grid(path, steps)
            assert len(times) == steps + 1 and (times[0], times[-1]) == (t_max, t_min)
            roots = [float(path.eta(t)) ** (1 / 7) for t in times]
            np.testing.assert_allclose(np.diff(roots), (roots[-1] - roots[0]) / steps, rtol=1e-6)


def test_a_grid_through_given_times_or_etas():
    assert through_grid(Path(), [0.5]) == [0.994, 0.5, 0.0]
    path = Path("fm", "simple_edm", t_min=0.006)
    assert through_grid(path, [float(path.eta_inverse(1.4))]) == pytest.approx(
        [0.994, 0.583333, 0.006], abs=1e-6
    )
    for times in ([0.5, 0.6], [0.994], [0.5, 0.0]):
        with pytest.raises(ValueError, match=r"they must fall, between 0.994 and 0"):
            through_grid(Path(), times)
    with pytest.raises(ValueError, match="t_max 1.0 has no finite eta"):
        edm_grid(Path(t_max=1.0), 2)


def blended(path: Path, data: torch.Tensor):
    """G of a network that knows its one data point: whatever x_t is, it came from there."""

    def output(x: torch.Tensor, t: float, s: float) -> torch.Tensor:
        noise = (x - path.alpha(t) * data) / path.sigma(t)
        return path.target(data, noise, t)

    return output


@pytest.mark.parametrize("path", [Path(), Path("fm", "identity"), COSINE], ids=str)
def test_restart_reaches_the_data_and_draws_its_noise_in_between(path: Path):
    data, x = torch.randn(2, 5, dtype=torch.float64)
    for grid in (uniform_grid(1, *path.time_range), uniform_grid(4, *path.time_range), edm_grid(path, 3)):
        asked, visited = [], []

        def noise(i: int, asked=asked) -> torch.Tensor:
            asked.append(i)
            return path.sigma_data * torch.randn(5, dtype=torch.float64)

        def output(x, t, s, visited=visited):
            visited.append((t, s, x))
            return blended(path, data)(x, t, s)

        torch.testing.assert_close(restart(output, path.jump, path.add_noise, x, grid, noise), data)
        assert asked == list(range(len(grid) - 2)), "none after the last jump"
        assert [(t, s) for t, s, _ in visited] == [(t, grid[-1]) for t in grid[:-1]]


def test_restart_noises_what_it_has_at_the_level_of_the_next_time():
    """A network that always says x = 0 leaves only the noise: sigma(t) sigma_data of it before each jump."""
    path = Path("fm", "identity")
    levels = []

    def output(x, t, s):
        levels.append((t, float(x.std())))
        return torch.zeros_like(x)

    draw = keyed_numpy("noise")
    restart(
        output,
        path.jump,
        path.add_noise,
        torch.zeros(20_000),
        uniform_grid(4, *path.time_range),
        lambda i: path.sigma_data * torch.from_numpy(draw.standard_normal(20_000)),
    )
    for t, std in levels[1:]:
        assert std == pytest.approx(t * path.sigma_data, rel=0.03)


def test_the_state_stays_float64_over_a_float32_network():
    path = Path()
    x = torch.randn(5, dtype=torch.float64)

    def output(x, t, s):
        return x.float()

    assert pushforward(output, path.jump, x, uniform_grid(3)).dtype == torch.float64
    assert restart(output, path.jump, path.add_noise, x, uniform_grid(3), lambda i: x).dtype == torch.float64


def test_guidance_of_one_makes_no_second_call_and_of_zero_is_the_null():
    def never(x, t, s):
        raise AssertionError("called")

    ones = guided(one_by_one(lambda x, t, s: x + 1, never), 1.0)
    assert ones(torch.zeros(1), 1.0, 0.0) == 1
    both = one_by_one(lambda x, t, s: x + 1, lambda x, t, s: x - 1)
    assert guided(both, 3.0)(torch.zeros(1), 1.0, 0.0) == 5
    assert guided(both, 0.0)(torch.zeros(1), 1.0, 0.0) == -1


def test_guidance_outside_of_its_range_makes_no_second_call():
    asked = []

    def null(x, t, s):
        asked.append(t)
        return x - 1

    mixed = guided(one_by_one(lambda x, t, s: x + 1, null), 3.0, (0.25, 0.75))
    found = [float(mixed(torch.zeros(1), t, 0.0)) for t in (1.0, 0.75, 0.5, 0.25, 0.1)]
    assert found == [1, 5, 5, 5, 1] and asked == [0.75, 0.5, 0.25]


def test_tokens_follow_the_law_and_the_nucleus():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    for (temperature, top_p), expected in {
        (1.0, 1.0): [0.5, 0.3, 0.15, 0.05],
        (1.0, 0.7): [0.625, 0.375, 0, 0],
        (0.5, 1.0): [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365],
        (0.0, 1.0): [1.0, 0.0, 0.0, 0.0],
    }.items():
        torch.testing.assert_close(tempered(logits, temperature, top_p).exp(), torch.tensor(expected))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps 0"),
        ({"guidance": -1.0}, "guidance"),
        ({"guidance_range": (0.5, 0.5)}, "guidance_range 0.5 0.5 must be two times"),
        ({"guidance_range": (0.0, 1.5)}, "guidance_range 0 1.5"),
        ({"shift": 0.0}, "shift 0.0 must be positive"),
        ({"top_p": 0.0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"tokens_per_pass": 0}, "tokens_per_pass 0"),
        ({"steps": 2.0}, "steps 2.0 must be a whole number"),
        ({"blocks": 2, "steps": (2, True)}, "steps True must be a whole number"),
        ({"max_tokens": "9"}, "max_tokens '9' must be a whole number"),
        ({"guidance": math.nan}, "guidance nan must be a finite number"),
        ({"guidance_range": (0.0, math.nan)}, "guidance_range nan must be a finite number"),
        ({"picture_guidance": math.inf}, "picture_guidance inf must be a finite number"),
        ({"shift": math.inf}, "shift inf must be a finite number"),
        ({"temperature": math.nan}, "temperature nan must be a finite number"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Plan(**change)
