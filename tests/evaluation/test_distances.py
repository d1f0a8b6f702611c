"""Distances against closed forms, unbiasedness over repeats, and that copying is not rewarded."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from mmgen.evaluation.distances import (
    frechet,
    frechet_distance,
    frechet_statistic,
    kid,
    kid_difference,
    kid_value,
    polynomial_kernel,
    real_floor,
)


def gaussian(seed: int, num: int, dim: int, mean: float = 0.0, scale: float = 1.0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(mean, scale, (num, dim)))


def with_moments(x: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """x moved so that its sample mean and covariance are exactly these."""
    centred = x - x.mean(0)
    white = centred @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(centred.T))).T
    return white @ torch.linalg.cholesky(covariance).T + mean


def v_statistic(x: Tensor, y: Tensor) -> float:
    """The biased KID: what one gets by averaging whole kernel matrices."""
    return (
        polynomial_kernel(x, x).mean() + polynomial_kernel(y, y).mean() - 2 * polynomial_kernel(x, y).mean()
    ).item()


def test_frechet_of_isotropic_gaussians_is_closed_form() -> None:
    dim, eye = 5, torch.eye(5, dtype=torch.float64)
    x = with_moments(gaussian(0, 50, dim), torch.zeros(dim).double(), 4 * eye)
    y = with_moments(gaussian(1, 70, dim), torch.full((dim,), 3.0).double(), 9 * eye)
    assert frechet_distance(x, y) == pytest.approx(dim * 3**2 + dim * (3 - 2) ** 2, rel=1e-9)


@pytest.mark.parametrize("num", [200, 12])
def test_frechet_equals_the_matrix_square_root_also_with_singular_covariances(num: int) -> None:
    x = gaussian(0, num, 20) @ gaussian(2, 20, 20)
    y = gaussian(1, num, 20) @ gaussian(3, 20, 20) + 0.5
    cov_x, cov_y = np.cov(x.numpy().T), np.cov(y.numpy().T)
    root = np.real(scipy.linalg.sqrtm(cov_x @ cov_y))
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum().item() + np.trace(cov_x + cov_y - 2 * root)
    # The matrix square root loses digits where the product is singular.
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-8 if num == 200 else 1e-4)


def test_frechet_statistic_is_the_distance_of_sets_with_repeats() -> None:
    x, y = torch.randn(40, 6, dtype=torch.float64), torch.randn(30, 6, dtype=torch.float64) * 2
    counts_x, counts_y = torch.arange(40) % 3, torch.arange(30) % 2
    drawn = frechet_statistic(x, y)(
        torch.stack([torch.ones(40), counts_x]).double(), torch.stack([torch.ones(30), counts_y]).double()
    )
    assert drawn[0].item() == pytest.approx(frechet_distance(x, y), rel=1e-9)
    repeated = frechet_distance(x.repeat_interleave(counts_x, 0), y.repeat_interleave(counts_y, 0))
    assert drawn[1].item() == pytest.approx(repeated, rel=1e-9)


def test_frechet_of_equal_sets_is_zero_and_never_below() -> None:
    x = gaussian(0, 30, 100).float()
    assert 0 <= frechet_distance(x, x.clone()) < 1e-8


def test_kid_of_point_masses_is_closed_form() -> None:
    x, y = torch.tensor([[1.0, 0.0]]).expand(4, 2), torch.tensor([[0.0, 2.0]]).expand(3, 2)
    expected = (1 / 2 + 1) ** 3 + (4 / 2 + 1) ** 3 - 2 * (0 / 2 + 1) ** 3
    assert kid_value(x, y) == pytest.approx(expected)


def test_kid_is_unbiased_and_the_v_statistic_is_not() -> None:
    values, biased = [], []
    for repeat in range(200):
        x, y = gaussian(2 * repeat, 15, 4), gaussian(2 * repeat + 1, 15, 4)
        values.append(kid_value(x, y))
        biased.append(v_statistic(x, y))
    error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values)) < 3 * error
    assert np.mean(biased) > 10 * error


def test_kid_interval_holds_zero_for_one_law_and_not_for_two() -> None:
    x = gaussian(0, 150, 8)
    same, shifted = kid(x, gaussian(1, 150, 8), ("same",)), kid(x, gaussian(2, 150, 8, 0.5), ("shifted",))
    assert same.low < 0 < same.high
    assert 0 < shifted.low < shifted.value < shifted.high


def test_kid_bootstrap_is_centred_on_its_value() -> None:
    """Counting an item drawn twice as a pair with itself would move the whole interval up."""
    estimate = kid(gaussian(0, 60, 8), gaussian(1, 60, 8, 0.3), ("centred",))
    middle = (estimate.low + estimate.high) / 2
    assert abs(middle - estimate.value) < 0.3 * (estimate.high - estimate.low)


@pytest.mark.parametrize("paired", [True, False])
def test_few_pictures_still_have_an_interval(paired: bool) -> None:
    """Of four pictures one draw in 64 is of a single one, which has no pairs."""
    estimate = kid(gaussian(0, 4, 3), gaussian(1, 4, 3), ("few",), paired)
    assert estimate.low <= estimate.value <= estimate.high


def test_copying_the_prompts_own_pictures_is_not_better_than_drawing_new_ones() -> None:
    real = gaussian(0, 200, 8, scale=2.0)
    copies, new = real + 0.01 * gaussian(1, 200, 8), gaussian(2, 200, 8, scale=2.0)
    naive = kid(copies, real, ("copies",))
    assert (
        naive.value < real_floor(kid_value, real, ("copies",)).value - 0.1
    )  # the trap: better than real pictures
    paired = kid(copies, real, ("copies",), paired=True)
    assert abs(paired.value) < abs(naive.value) / 10
    again = kid(new, real, ("new",), paired=True)
    assert again.low < 0 < again.high


def test_paired_kid_is_unbiased() -> None:
    values = [
        kid(gaussian(2 * i, 15, 4), gaussian(2 * i + 1, 15, 4), ("p", i), paired=True).value
        for i in range(200)
    ]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))


def test_frechet_of_copies_is_the_floor() -> None:
    real = gaussian(0, 60, 10)
    floor = real_floor(frechet_distance, real, ("f",))
    assert frechet(real, real, ("f",)) == floor
    assert frechet_distance(real, real) < floor.low  # the trap: whole sets let copies pass below the floor
    assert frechet(real + 1, real, ("f",)).value == pytest.approx(floor.value + 10, rel=0.2)


def test_too_few_or_broken_features_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 pictures"):
        kid_value(gaussian(0, 1, 3), gaussian(1, 5, 3))
    with pytest.raises(ValueError, match="cannot be halved"):
        frechet(gaussian(0, 3, 3), gaussian(1, 3, 3), ("few",))
    with pytest.raises(ValueError, match="NaN"):
        frechet_distance(torch.full((5, 3), torch.nan), gaussian(1, 5, 3))


def test_what_prompts_do_to_both_sets_cancels_in_a_difference():
    """Two sets of which the second is the first with a shift: their distances vary with the prompts, the difference of
    the two hardly does; and it is the difference of the paired distances."""
    draw = torch.Generator().manual_seed(0)
    real = torch.randn(120, 8, generator=draw)
    x = real + 1 + 0.3 * torch.randn(120, 8, generator=draw)
    further = x + 0.05
    near, far = (kid(each, real, ("a",), paired=True) for each in (x, further))
    found = kid_difference(further, x, real, ("b",))
    assert found.value == pytest.approx(far.value - near.value, rel=1e-9)
    assert found.low > 0 and found.high - found.low < 0.6 * (far.high - far.low)
    nothing = kid_difference(x, x, real, ("c",))
    assert nothing.value == nothing.low == nothing.high == 0
