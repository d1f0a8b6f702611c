"""Copies are found, new pictures are not, and duplicates in the held-out set do not hide copies."""

import pytest
import torch

from mmgen.evaluation.memorization import memorization, nearest_distances


def draw(num: int) -> torch.Tensor:
    return torch.randn(num, 16)


def test_copies_are_found_and_new_pictures_pass() -> None:
    training, held_out = draw(300), draw(300)
    new = memorization(draw(400), training, held_out)
    copies = memorization(training[:50] + 0.01 * draw(50), training, held_out)
    assert 0.01 < new.share.value < 0.12 and 0.9 < new.ratio < 1.1  # .05, were the quantile known exactly
    assert copies.share.value == 1 and copies.ratio < 0.05


def test_half_copies_are_half() -> None:
    training, held_out = draw(300), draw(300)
    mixed = memorization(torch.cat([training[:100], draw(100)]), training, held_out)
    assert mixed.share.low > 0.4 and mixed.share.value < 0.6


def test_exact_copies_count_even_where_the_threshold_is_zero() -> None:
    training = draw(40)
    held_out = torch.cat([training[:10], draw(20)])
    result = memorization(training[:5], training, held_out)
    assert result.threshold == 0 and result.share.value == 1


def test_distance_is_root_mean_square() -> None:
    distances = nearest_distances(torch.zeros(1, 4), torch.tensor([[2.0] * 4, [9.0] * 4]))
    assert distances.item() == pytest.approx(2)


def test_too_few_held_out_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 20"):
        memorization(draw(5), draw(5), draw(19))
