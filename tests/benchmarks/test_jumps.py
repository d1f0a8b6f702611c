"""The three claims about blind jumps, in closed form and with short trainings, each with what must not pass."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from benchmarks.jumps import (
    CASES,
    EDGE,
    GRID,
    HEADLINE,
    INTERVAL,
    JumpNetwork,
    blind_slopes,
    data_sets,
    euler,
    floor,
    from_noise,
    ks_distance,
    low_digits,
    normal_quantiles,
    optimal_output,
    permutation_test,
    rejected,
    scale,
    sign_flip,
    standard_deviation,
    train_flow_matching,
    train_jump,
    train_on_laws,
    true_map,
    variance_share,
)
from mmgen.objectives import FlowMatching, FlowMatchingConfig

OBJECTIVE = FlowMatching(FlowMatchingConfig())
PATH = OBJECTIVE.path
DATA = data_sets()


def noise(data: torch.Tensor, num: int = 300) -> torch.Tensor:
    return PATH.sigma_data * torch.randn(num, data.shape[1], dtype=torch.float64)


# T1


@pytest.mark.parametrize("name", list(DATA))
def test_one_euler_step_of_the_optimum_is_the_mean_of_the_data(name: str) -> None:
    data = DATA[name]
    output, start = optimal_output(PATH, data), noise(data)
    samples = euler(PATH, output, start, 1)
    torch.testing.assert_close(samples, data.mean(0).expand_as(samples), rtol=0, atol=1e-12)
    assert variance_share(samples, data) < 1e-24
    # The output is not at fault: of the same G, more steps make samples that spread as the data do.
    assert variance_share(euler(PATH, output, start, 32), data) > 0.7


def test_the_optimum_is_where_flow_matchings_loss_is_least() -> None:
    data, t = DATA["moons"], 0.6
    draws = 20_000
    x = data[torch.randint(len(data), (draws,))]
    e = noise(data, draws)
    x_t = PATH.add_noise(x, e, torch.tensor(t, dtype=torch.float64))

    def loss(output: torch.Tensor) -> float:
        return OBJECTIVE.token_loss(output[None], x[None], e[None]).mean().item()

    best = optimal_output(PATH, data)(x_t, t)
    others = [best + 0.1, best - 0.1, 1.05 * best, optimal_output(PATH, data)(x_t, t + 0.05)]
    assert all(loss(best) < loss(other) for other in others)


def test_the_optimum_knows_two_points() -> None:
    """Data -a and a: E[x0 | x_t] = a tanh(a (1 - t) x_t / (t sigma)^2)."""
    a, t, x = 0.5, 0.4, torch.linspace(-1, 1, 21, dtype=torch.float64)[:, None]
    mean = a * torch.tanh(a * (1 - t) * x / (t * PATH.sigma_data) ** 2)
    output = optimal_output(PATH, torch.tensor([[-a], [a]], dtype=torch.float64))(x, t)
    torch.testing.assert_close(output, (x - mean) / (t * PATH.sigma_data))


@pytest.mark.slow
def test_a_trained_network_draws_nearly_the_mean_in_one_step() -> None:
    data = DATA["moons"]
    output, start = train_flow_matching(data, seed=0, steps=250), noise(data)
    one, many = (euler(PATH, output, start, n) for n in (1, 16))
    assert variance_share(one, data) < 0.05
    assert (one.mean(0) - data.mean(0)).norm() < 0.1 * data.std()
    assert variance_share(many, data) > 0.5


# T2


def test_the_floor_of_two_targets_is_what_it_is() -> None:
    assert floor(HEADLINE) == pytest.approx(0.8 * (1 - math.sqrt(0.5)) ** 2, abs=1e-12)
    assert floor(HEADLINE) == pytest.approx(0.0686, abs=5e-5)


def test_there_is_no_floor_under_one_target_or_under_constant_data() -> None:
    for d in (0.3, 1.0, 3.0):
        assert floor(from_noise(d, 0.0)) == pytest.approx(0, abs=1e-24)
    assert floor(from_noise(1e-9, 0.0, 0.25, 0.5, 0.75)) < 1e-16  # S(s) = s is a straight line
    assert floor(from_noise(0.1, 0.0, 0.5)) > 1e-4


def test_the_interval_has_the_floor_of_the_integrals() -> None:
    """Least squares with integrals over s: a fine grid is enough."""

    def integral(f) -> float:
        return integrate.quad(f, 0, 1)[0]

    def asked(s: float) -> float:
        return standard_deviation(s) - 1

    slope = integral(lambda s: asked(s) * (s - 1)) / integral(lambda s: (s - 1) ** 2)
    assert floor(INTERVAL) == pytest.approx(integral(lambda s: (asked(s) - slope * (s - 1)) ** 2), rel=0.01)


@pytest.mark.parametrize("case", [case for case in CASES if case is not INTERVAL], ids=lambda case: case.name)
def test_no_function_of_x_and_t_is_below_the_floor(case) -> None:
    """Linear regression on many features of x, for each t by itself, ends at the floor; features of s go below it."""
    x = normal_quantiles(200)
    x /= x.std()
    features = [x, x**2, x**3, np.abs(x), np.sign(x), np.cos(3 * x), np.ones_like(x)]
    blind = told = 0.0
    for start in {t for t, _ in case.pairs}:
        targets = np.array([s for t, s in case.pairs if t == start])
        deviation = [float(scale(torch.tensor(s).double(), case.d)) for s in (*targets, start)]
        asked = np.concatenate([x * (ratio / deviation[-1] - 1) for ratio in deviation[:-1]])
        design = np.concatenate([np.stack([(s - start) * f for f in features], 1) for s in targets])
        blind += np.square(asked - design @ np.linalg.lstsq(design, asked)[0]).sum() / len(x)
        powers = np.concatenate(
            [np.stack([(s - start) * x * s**k for k in range(len(targets))], 1) for s in targets]
        )
        told += np.square(asked - powers @ np.linalg.lstsq(powers, asked)[0]).sum() / len(x)
    assert blind == pytest.approx(floor(case), abs=1e-9)
    assert told < 1e-20


def test_starts_that_differ_have_slopes_of_their_own() -> None:
    """A jump knows its t: pairs from two starts are two fits, and their floors add up."""
    both = replace(HEADLINE, pairs=((1.0, 0.0), (1.0, 0.5), (0.75, 0.0), (0.75, 0.25)))
    parts = [replace(HEADLINE, pairs=both.pairs[:2]), replace(HEADLINE, pairs=both.pairs[2:])]
    assert floor(both) == pytest.approx(sum(map(floor, parts)))
    slopes = blind_slopes(both)
    assert slopes[0] == slopes[1] and slopes[2] == slopes[3] and slopes[0] != slopes[2]


@pytest.mark.slow
def test_both_arms_start_alike_and_only_one_reaches_zero() -> None:
    first, second = JumpNetwork(1, 64, seed=0), JumpNetwork(1, 64, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    blind, told = (train_jump(HEADLINE, knows, seed=0, steps=150).curve for knows in (False, True))
    least = floor(HEADLINE)
    assert min(error for _, error in blind) > least * (1 - 1e-4)  # never below, at any step
    assert blind[-1][1] < least * 1.03
    assert told[-1][1] < least / 1000


def test_a_blind_network_serves_one_destination() -> None:
    """As a generator or a consistency model does: the network is not what holds the blind arm back."""
    curve = train_jump(from_noise(0.5, 0.0), told=False, seed=0, steps=150).curve
    assert curve[0][1] > 0.1 and curve[-1][1] < 1e-5


# T3


def test_the_decoy_has_the_variance_of_every_s_and_the_law_of_none_between() -> None:
    """Integrals over N(0, 1), beyond EDGE and within; all are even."""
    assert pytest.approx(1.538, abs=5e-4) == EDGE

    def moment(power: int, low: float, high: float) -> float:
        return 2 * integrate.quad(lambda x: x**power * stats.norm.pdf(x), low, high)[0]

    for s in np.linspace(0, 1, 11):
        variance, fourth = (
            moment(power, 0, EDGE) + (2 * s - 1) ** power * moment(power, EDGE, 12) for power in (2, 4)
        )
        assert variance == pytest.approx(standard_deviation(s) ** 2, abs=1e-9)
        if s == 0.5:
            assert fourth / variance**2 == pytest.approx(2.44, abs=5e-3)
    x = normal_quantiles(100_000)
    at_half = sign_flip(x, 0.5)
    assert (at_half == 0).mean() == pytest.approx(0.124, abs=5e-4)
    assert stats.kurtosis(at_half, fisher=False) == pytest.approx(2.44, abs=5e-3)
    assert ks_distance(sign_flip, 0.5) == pytest.approx(0.124 / 2, abs=5e-4)
    assert ks_distance(sign_flip, 0.0) < 1e-4 and ks_distance(sign_flip, 1.0) < 1e-4


def test_a_blind_map_that_had_every_law_would_need_a_second_random_number() -> None:
    """If x - h u has the law of p_(1 - h) for all h of an interval, then E[u^2 x^2] = 4: the h^2 term of 3 S^4.

    The decoy has the second moments and not this one; `low_digits` comes near.
    """
    x = normal_quantiles(200_000)
    for jump, second in ((sign_flip, 9.56), (low_digits(4096), 4.0)):
        u = x - jump(x, 0.0)
        assert (u * u).mean() == pytest.approx(2, abs=0.03) and (u * x).mean() == pytest.approx(1, abs=0.03)
        assert (u * u * x * x).mean() == pytest.approx(second, abs=0.1)


def test_the_variance_passes_the_decoy_and_the_law_does_not() -> None:
    found = rejected(sign_flip, 1000, seed=0)
    assert found == {"variance": False, "cubic": False, "ks": True, "laplace": True}
    assert not any(rejected(true_map, 1000, seed=0).values())


def test_every_test_can_reject() -> None:
    assert all(rejected(lambda x, s: x, 1000, seed=0).values())


def test_a_permutation_test_keeps_its_level() -> None:
    draw = np.random.default_rng(0)
    p = []
    for _ in range(200):
        x = draw.standard_normal(40)
        p.append(permutation_test(np.exp(-np.abs(x[:, None] - x)), draw, permutations=99))
    assert stats.kstest(p, "uniform").pvalue > 0.01


def test_digits_of_x_are_random_numbers_enough() -> None:
    """What T3 does not say: with more pieces a blind map is as near to every law as one likes, and ever wilder."""
    distances = [max(ks_distance(low_digits(n), s) for s in GRID) for n in (1, 4, 64, 1024)]
    assert distances[0] > 0.05 and distances[0] > distances[1] > distances[2] and distances[3] < 0.005
    assert not any(rejected(low_digits(1024), 1000, seed=1).values())


def test_in_two_dimensions_a_quarter_turn_has_every_law() -> None:
    """What T3 does not say either: u = x - d J x is blind and x_s = s x + (1 - s) d J x is N(0, S(s)^2 I) exactly."""
    turn = np.array([[0.0, -1.0], [1.0, 0.0]])
    for d in (0.5, 1.0):
        u = np.eye(2) - d * turn
        for s in np.linspace(0, 1, 11):
            jump = np.eye(2) + (s - 1) * u
            variance = float(scale(torch.tensor(s), d)) ** 2
            np.testing.assert_allclose(jump @ jump.T, variance * np.eye(2), atol=1e-12)
    # A reflection in its place, or no turn, has the laws of the ends alone.
    for other in (np.diag([1.0, -1.0]), np.eye(2)):
        jump = 0.5 * (np.eye(2) + other)
        assert np.abs(jump @ jump.T - 0.5 * np.eye(2)).max() > 0.4


@pytest.mark.slow
def test_a_blind_network_trained_on_the_laws_keeps_away_from_them() -> None:
    network = train_on_laws(seed=0, steps=100)
    assert max(ks_distance(network, s) for s in GRID) > 0.05
    assert rejected(network, 1000, seed=0)["ks"]
