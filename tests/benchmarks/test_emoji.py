"""The emoji benchmark: what its comparisons and its variety say of known drawings."""

import pytest
import torch

from benchmarks.emoji import LEVELS, Arguments, Drawn, Real, _comparisons, _variety

CAPTIONS = ["a cat", "a cat", "a dog", "a dog", "a dog", "a fish"]


def test_variety_is_one_for_real_pictures_and_small_for_one_picture_again_and_again():
    prompts = ["a dog"] * 300
    draw = torch.Generator().manual_seed(0)
    real = (torch.randint(3, (300,), generator=draw) + 2).tolist()
    assert _variety(prompts, real, CAPTIONS) == pytest.approx(1.0, abs=0.01)
    assert _variety(prompts, [2] * 300, CAPTIONS) == pytest.approx(1 / 3, abs=0.01)
    assert _variety(prompts, [0] * 300, CAPTIONS) == 0, "pictures of another caption do not count"
    assert _variety(["a fish"], [5], CAPTIONS) is None, "there is one picture of it"


def test_comparisons_take_the_better_grid_and_have_the_sign_of_the_difference():
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(40, 8, generator=draw)
    real = Real({level: ["a"] * 40 for level in LEVELS}, features, features, torch.arange(40))

    def drawn(shift: float, share: float) -> Drawn:
        hits = torch.arange(40) < 40 * share
        return Drawn(torch.randn(40, 8, generator=draw) + shift, hits)

    arguments = Arguments(seeds=2, guidance=(1.0,), shifts=(0.5, 1.0))
    found = {}
    for level in LEVELS:
        found["imm", level, 1.0, 0.5, 2] = [drawn(2.0, 0.1), drawn(2.0, 0.1)]
        found["imm", level, 1.0, 1.0, 2] = [drawn(0.0, 0.75), drawn(0.0, 0.75)]
        for shift in (0.5, 1.0):
            found["flow_matching", level, 1.0, shift, 16] = [drawn(0.6, 0.5), drawn(0.6, 0.5)]
    rows = _comparisons(found, real, arguments)
    assert [row["level"] for row in rows] == list(LEVELS)
    for row in rows:
        assert row["shift"] == 1.0, "the better of IMM's grids by KID"
        assert row["hit_difference"].value == pytest.approx(0.25) and row["hit_difference"].low > 0
        assert row["kid_difference"].high < 0, "nearer to the real pictures"
