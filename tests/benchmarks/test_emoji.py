"""The emoji benchmark: what its comparisons and its variety say of known drawings."""

from itertools import product

import pytest
import torch

from benchmarks import arms
from benchmarks.emoji import LEVELS, Arguments, Case, Drawn, Real, _comparisons, _variety
from mmgen.sampling.plan import Plan

CAPTIONS = ["a cat", "a cat", "a dog", "a dog", "a dog", "a fish"]


def test_variety_is_one_for_real_pictures_and_small_for_one_picture_again_and_again():
    prompts = ["a dog"] * 300
    draw = torch.Generator().manual_seed(0)
    real = (torch.randint(3, (300,), generator=draw) + 2).tolist()
    assert _variety(prompts, real, CAPTIONS) == pytest.approx(1.0, abs=0.01)
    assert _variety(prompts, [2] * 300, CAPTIONS) == pytest.approx(1 / 3, abs=0.01)
    assert _variety(prompts, [0] * 300, CAPTIONS) == 0, "pictures of another caption do not count"
    assert _variety(["a fish"], [5], CAPTIONS) is None, "there is one picture of it"


def test_comparisons_take_the_best_plan_and_have_the_sign_of_the_difference():
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(40, 8, generator=draw)
    real = Real({level: ["a"] * 40 for level in LEVELS}, features, features, torch.arange(40))

    def drawn(shift: float, share: float) -> Drawn:
        hits = torch.arange(40) < 40 * share
        return Drawn(torch.randn(40, 8, generator=draw) + shift, hits)

    arguments = Arguments(seeds=3, steps=(2, 16), guidance=(1.0,), shifts=(0.5, 1.0))
    found = {}
    for level in LEVELS:
        for shift, drift, share in ((0.5, 2.0, 0.1), (1.0, 0.0, 0.75)):
            case = Case("imm", level, 2, Plan(steps=2, shift=shift))
            found[case] = [drawn(drift, share) for _ in range(3)]
        for steps in (2, 16):
            for plan in arms.plans("flow_matching", steps, arguments.shifts):
                best = plan.solver == "heun" and plan.shift == (1.0 if steps == 2 else 0.5)
                found[Case("flow_matching", level, steps, plan)] = [
                    drawn(0.6 if best else 0.9, 0.5) for _ in range(3)
                ]
    rows = _comparisons(found, real, arguments)
    assert [(row["level"], row["flow_matching_steps"]) for row in rows] == list(product(LEVELS, (2, 16)))
    for row in rows:
        assert row["shift"] == 1.0, "the better of IMM's grids by KID"
        assert row["flow_matching_solver"] == "heun"
        assert row["flow_matching_shift"] == (1.0 if row["flow_matching_steps"] == 2 else 0.5)
        assert row["hit_difference"].value == pytest.approx(0.25) and row["hit_difference"].low > 0
        assert row["kid_difference"].high < 0, "nearer to the real pictures"
