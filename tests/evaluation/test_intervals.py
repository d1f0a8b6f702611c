"""Intervals: known formulas, coverage, and that a paired bootstrap uses the pairing."""

import math

import numpy as np
import pytest
import torch

from mmgen.evaluation.intervals import bootstrap, mean, proportion, ratio, spread


def test_wilson_matches_the_published_example() -> None:
    # Newcombe 1998, table I: 81 of 263 gives .2553 to .3662.
    estimate = proportion([True] * 81 + [False] * 182)
    assert (round(estimate.low, 4), round(estimate.high, 4)) == (0.2553, 0.3662)
    assert estimate.value == pytest.approx(81 / 263)


def test_wilson_is_not_certain_of_all_hits() -> None:
    estimate = proportion([True] * 10)
    assert estimate.high == 1 and 0.7 < estimate.low < 0.75
    assert proportion(torch.zeros(10, dtype=torch.bool)).low == 0


def test_mean_interval_has_the_width_of_the_normal_one() -> None:
    x = torch.from_numpy(np.random.default_rng(0).normal(size=400))
    estimate = mean(x, ("width",))
    expected = 2 * 1.96 * x.std().item() / math.sqrt(400)
    assert estimate.high - estimate.low == pytest.approx(expected, rel=0.1)
    assert estimate.value == pytest.approx(x.mean().item())


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for repeat in range(200):
        estimate = mean(torch.from_numpy(rng.normal(size=60)), ("cover", repeat))
        covered += estimate.low <= 0 <= estimate.high
    assert 180 <= covered <= 199


def test_same_key_same_interval() -> None:
    x = torch.arange(20.0)
    assert mean(x, ("a", 1)) == mean(x, ("a", 1))
    assert mean(x, ("a", 1)) != mean(x, ("a", 2))


def test_ratio_weighs_documents_by_their_size() -> None:
    estimate = ratio(torch.tensor([1.0, 9.0]), torch.tensor([1, 3]), ("ratio",))
    assert estimate.value == pytest.approx(10 / 4)  # the mean of the two ratios would be 2


def test_paired_bootstrap_is_narrower_where_prompts_differ_more_than_models() -> None:
    rng = np.random.default_rng(0)
    difficulty = rng.normal(size=100)
    a = torch.from_numpy(difficulty + 0.1 * rng.normal(size=100))
    b = torch.from_numpy(difficulty + 0.1 * rng.normal(size=100) + 0.1)

    def average(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return (w @ x) / w.sum(1)

    paired = bootstrap(lambda w: average(b, w) - average(a, w), [100], ("paired",))
    apart = bootstrap(lambda u, v: average(b, u) - average(a, v), [100, 100], ("apart",))
    assert paired.value == pytest.approx(apart.value)
    assert paired.low > 0 > apart.low
    assert paired.high - paired.low < (apart.high - apart.low) / 3


def test_spread_holds_95_percent() -> None:
    estimate = spread([float(value) for value in range(101)], num=7)
    assert (estimate.value, estimate.low, estimate.high, estimate.num) == (50, 2.5, 97.5, 7)


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one item"):
        proportion([])
    with pytest.raises(ValueError, match="at least one item"):
        mean(torch.empty(0), ("none",))
