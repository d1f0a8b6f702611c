"""What is read off measured rows: axes, fronts, budgets and gains of surfaces that are known."""

from collections.abc import Mapping
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import pytest
import torch

from mmgen.evaluation.frontier import JOINTLY, REAL, Surface, better, difference
from mmgen.evaluation.verdicts import plan_text, verdicts
from mmgen.sampling.plan import Plan

Values = Mapping[str, tuple[float, float]]


def estimate(value: float, width: float = 0.01) -> dict[str, float]:
    return {"value": value, "low": value - width, "high": value + width, "num": 50}


def row(plan: Plan, values: Values, width: float = 0.01, **fields: Any) -> dict[str, Any]:
    """As `mmgen tradeoff` writes it; `values`: figure -> its value on the choosing and on the reported half."""
    nfe = sum(plan.block_steps) * (1 if plan.guidance == 1 else 2)
    return {
        "nfe": nfe, "flops": 1e6 * nfe, "seconds": 1e-3 * nfe, "chosen": True,
        "plan": {**asdict(plan), **fields},
        "choosing": {name: estimate(first, width) for name, (first, _) in values.items()},
        "reported": {name: estimate(second, width) for name, (_, second) in values.items()},
    }  # fmt: skip


def kid(plan: Plan, choosing: float, reported: float | None = None, **fields: Any) -> dict[str, Any]:
    return row(plan, {"kid_lite0": (choosing, choosing if reported is None else reported)}, **fields)


def grid() -> list[dict[str, Any]]:
    """Steps pay and blocks do not: three numbers of steps by two of blocks."""
    values = {1: 0.8, 2: 0.4, 4: 0.1}
    return [
        kid(Plan(blocks=blocks, steps=steps), values[steps] + 0.05 * (blocks - 1))
        for blocks in (1, 2)
        for steps in (1, 2, 4)
    ]


def test_axes_are_what_varies_and_steps_may_be_a_list() -> None:
    rows = [
        kid(Plan(blocks=2, steps=(2, 1)), 0.3), kid(Plan(blocks=2, steps=(2, 2)), 0.3), kid(Plan(shift=0.5), 0.3)
    ]  # fmt: skip
    surface = Surface(rows)
    assert surface.axes == {"blocks": [1, 2], "steps": [2, 4, (2, 1)], "shift": [0.5, 1.0]}
    assert surface.at == [(1, 2, 1), (1, 0, 1), (0, 1, 0)]
    assert plan_text({"steps": surface.value(0, "steps")}) == "steps 2+1"


def test_a_field_that_no_plan_has_yet_is_an_axis_too() -> None:
    rows = [kid(Plan(), 0.3, thinking=0), kid(Plan(), 0.2, thinking=8), kid(Plan(), 0.1, thinking=16)]
    surface = Surface(rows)
    assert surface.varying == ["thinking"] and [line.name for line in surface.lines()] == ["thinking"]
    assert list(surface.pairs("thinking")) == [(0, 1), (1, 2)]


def test_lines_hold_the_other_axes_at_their_base() -> None:
    rows = [kid(Plan(steps=s, guidance=g), 0.3) for s in (2, 1) for g in (0.5, 1.0, 2.0)]
    lines = {line.name: line for line in Surface(rows).lines()}
    assert list(lines) == ["steps", "guidance", JOINTLY]
    assert dict(lines["steps"].held) == {"guidance": 1} and list(lines["steps"].members) == [1, 4]
    assert dict(lines["guidance"].held) == {"steps": 1} and list(lines["guidance"].members) == [3, 4, 5]


def test_choices_are_made_on_one_half_and_claims_on_the_other() -> None:
    # lucky: best where plans are chosen, worst where they are reported; modest: the other way round
    rows = [kid(Plan(steps=1), 0.5), kid(Plan(steps=2), 0.1, 0.9), kid(Plan(steps=4), 0.4, 0.01)]
    surface = Surface(rows)
    assert surface.front(range(3), "nfe", "kid_lite0") == [0, 1]
    assert surface.best(range(3), "nfe", "kid_lite0", budget=8) == 1
    assert surface.planned("nfe", "kid_lite0") == [(1, 0), (2, 1)]
    gain = surface.gain(0, 1, "kid_lite0")
    assert gain is not None and gain.verdict == "worse" and gain.change == pytest.approx(0.4)


def test_the_front_turns_with_what_is_better() -> None:
    rows = [
        row(Plan(steps=s), {"own_latent": (share, share), "kid_lite0": (0.1, 0.1)})
        for s, share in ((1, 0.2), (2, 0.1), (4, 0.6))
    ]
    surface = Surface(rows)
    assert surface.front(range(3), "flops", "own_latent") == [0, 2]
    assert surface.front(range(3), "flops", "kid_lite0") == [0]
    assert [better(name) for name in ("kid_lite0", "own_latent", "copies_lite0")] == ["lower", "higher", None]


def test_a_ladder_of_budgets_pays_for_the_cheapest_and_the_dearest() -> None:
    surface = Surface(grid())
    for cost in ("nfe", "flops", "seconds"):
        rungs = surface.iso(cost, "kid_lite0")
        first, last = rungs[0][1], rungs[-1][1]
        assert first == {"blocks": 0, "steps": 0, JOINTLY: 0} and last["steps"] == last[JOINTLY] == 2
        for budget, best in rungs:
            assert all(surface.rows[i][cost] <= budget for i in best.values() if i is not None)
        assert all(one[1] != other[1] for one, other in pairwise(rungs))


def test_pairs_are_a_value_and_its_double_all_else_equal() -> None:
    rows = [kid(Plan(steps=s, guidance=g), 0.1) for g in (1.0, 2.0, 3.0) for s in (1, 2, 3)]
    surface = Surface(rows)
    moves = [(surface.value(a, "steps"), surface.value(b, "steps")) for a, b in surface.pairs("steps")]
    assert moves == [(1, 2), (2, 3)] * 3
    guided = [
        (surface.value(a, "guidance"), surface.value(b, "guidance")) for a, b in surface.pairs("guidance")
    ]
    assert guided == [(1, 2), (1, 3)] * 3
    for axis, other in (("steps", "guidance"), ("guidance", "steps")):
        assert all(surface.value(a, other) == surface.value(b, other) for a, b in surface.pairs(axis))


def test_the_interval_of_a_difference() -> None:
    # Newcombe (1998), example (a) of his methods for independent shares: 56/70 - 48/80
    one = {"value": 48 / 80, "low": 0.4904, "high": 0.7004}
    other = {"value": 56 / 70, "low": 0.6920, "high": 0.8772}
    change, low, high = difference(one, other)
    assert (change, low, high) == pytest.approx((0.2000, 0.0524, 0.3339), abs=2e-4)
    paired = difference(one, other, correlation=0.8)
    assert paired[0] == change and low < paired[1] < paired[2] < high


def test_hits_of_the_same_pictures_narrow_the_interval() -> None:
    rows = [row(Plan(steps=s), {"own_latent": (0.5, v)}, width=0.2) for s, v in ((1, 0.5), (2, 0.75))]
    hits = {(0, "own_latent"): [True, True, False, False], (1, "own_latent"): [True, True, True, False]}
    alone, paired = (Surface(rows, given).gain(0, 1, "own_latent") for given in ({}, hits))
    assert alone is not None and paired is not None and alone.change == paired.change
    assert paired.high - paired.low < alone.high - alone.low


def test_the_words_say_what_pays_and_what_does_not() -> None:
    said = {verdict.axis: verdict for verdict in verdicts(Surface(grid()), "flops", "kid_lite0")}
    assert said["steps"].kind == "pays" and "better in 4 of 4 comparisons" in said["steps"].title
    assert said["blocks"].kind == "no" and "does not pay" in said["blocks"].title
    assert "2 times the FLOPs" in said["steps"].text and "(1 → 2, 2 → 4)" in said["steps"].text
    flat = [kid(Plan(steps=s), 0.1) for s in (1, 2)]
    assert [verdict.kind for verdict in verdicts(Surface(flat), "nfe", "kid_lite0")] == ["open"]
    copies = [row(Plan(steps=s), {"copies_lite0": (0.1, 0.1)}) for s in (1, 2)]
    assert verdicts(Surface(copies), "nfe", "copies_lite0") == []


def test_an_axis_that_helps_less_than_another_is_told_apart() -> None:
    values = {(1, 1): 0.8, (1, 2): 0.1, (2, 1): 0.7, (2, 2): 0.05}
    rows = [kid(Plan(blocks=b, steps=s), value) for (b, s), value in values.items()]
    said = {verdict.axis: verdict for verdict in verdicts(Surface(rows), "nfe", "kid_lite0")}
    assert said["blocks"].kind == "elsewhere" and said["steps"].kind == "pays"


def test_rows_without_a_figure_are_left_out_of_it() -> None:
    rows = [*grid(), row(Plan(steps=8), {"own_latent": (0.9, 0.9)})]
    surface = Surface(rows)
    assert surface.figures == ["kid_lite0", "own_latent"]
    assert 6 not in surface.front(range(7), "nfe", "kid_lite0")
    assert surface.front(range(7), "nfe", "own_latent") == [6] and surface.planned("nfe", "own_latent") == [
        (8, 6)
    ]
    assert surface.gain(2, 6, "kid_lite0") is None


def test_a_policy_is_chosen_where_it_is_better_than_every_plan_of_its_budget() -> None:
    cheap, dear = Plan(steps=1), Plan(steps=4)
    rows = [kid(cheap, 0.8), kid(dear, 0.2)]
    policy = {key: value for key, value in kid(Plan(steps=2), 0.4).items() if key not in ("plan", "chosen")}
    policy["policy"] = {"first": asdict(cheap), "then": asdict(dear), "threshold": -3.0}
    surface = Surface(rows, policies=[policy])
    assert surface.adaptive("nfe", "kid_lite0") == [(1, None), (2, 0), (4, None)]
    assert surface.planned("nfe", "kid_lite0") == [(1, 0), (4, 1)], "plans alone, where none is asked for"
    assert Surface(rows).adaptive("nfe", "kid_lite0") == []


def test_a_distance_is_compared_prompt_by_prompt_where_features_are_known() -> None:
    draw = torch.Generator().manual_seed(0)
    real = torch.randn(40, 8, generator=draw)
    near = real + 0.3 * torch.randn(40, 8, generator=draw)
    rows = [kid(Plan(steps=1), 0.5), kid(Plan(steps=2), 0.4)]
    known = Surface(rows, features={REAL: real, 0: near + 0.5, 1: near}).gain(0, 1, "kid_lite0")
    other = Surface(rows, features={0: near + 0.5, 1: near}).gain(0, 1, "kid_lite0")
    assert known is not None and other is not None
    assert known.verdict == "better" and known.change != pytest.approx(-0.1), (
        "that of the features themselves"
    )
    assert other.change == pytest.approx(-0.1), "without the real ones what the rows say"


def test_a_gain_in_one_of_many_comparisons_is_chance() -> None:
    """Forty comparisons with one interval above 0 by luck; with eight of them it is no luck."""

    def title(lucky: int) -> str:
        rows = []
        for shift in range(1, 41):
            gain = 0.1 if shift <= lucky else 0.0
            rows += [kid(Plan(shift=shift), 0.5), kid(Plan(shift=shift, steps=8), 0.5 - gain)]
        return next(v.title for v in verdicts(Surface(rows), "nfe", "kid_lite0") if v.axis == "steps")

    assert title(1) == "Spending on steps was not shown to pay: better in 1 of 40 comparisons, as by chance"
    assert title(8).startswith("Spending on steps pays in part: better in 8 of 40")
    assert title(0).endswith("no gain in 40 comparisons")


@pytest.mark.parametrize(
    ("up", "down", "kind", "words"),
    [
        (8, 0, "part", "pays in part: better in 8 of 40 comparisons"),
        (8, 5, "part", "pays in part: better in 8 of 40 comparisons, worse in 5"),
        (8, 8, "no", "hurts as often as it helps: better in 8 of 40 comparisons, worse in 8"),
        (8, 9, "no", "hurts more often than it helps: better in 8 of 40 comparisons, worse in 9"),
        (1, 9, "no", "hurts more often than it helps: better in 1 of 40 comparisons, worse in 9"),
        (0, 9, "no", "does not pay: better in none of 40 comparisons, worse in 9"),
        (1, 2, "open", "was not shown to pay: better in 1 of 40 comparisons, worse in 2, as by chance"),
        (0, 1, "open", "was not shown to pay: better in none of 40 comparisons, worse in 1, as by chance"),
    ],
)
def test_an_axis_that_hurts_as_often_as_it_helps_is_not_said_to_pay(
    up: int, down: int, kind: str, words: str
) -> None:
    rows = []
    for shift in range(1, 41):
        gain = 0.1 if shift <= up else -0.1 if shift <= up + down else 0.0
        rows += [kid(Plan(shift=shift), 0.5), kid(Plan(shift=shift, steps=8), 0.5 - gain)]
    said = next(v for v in verdicts(Surface(rows), "nfe", "kid_lite0") if v.axis == "steps")
    assert (said.kind, said.title) == (kind, f"Spending on steps {words}")


def test_an_axis_that_helps_less_than_another_names_where_it_hurts() -> None:
    # blocks: two comparisons better and one worse; steps buy far more
    values = {(1, 1): 0.9, (1, 2): 0.4, (1, 4): 0.1, (2, 1): 0.8, (2, 2): 0.5, (2, 4): 0.05}
    rows = [kid(Plan(blocks=b, steps=s), value) for (b, s), value in values.items()]
    said = {verdict.axis: verdict.title for verdict in verdicts(Surface(rows), "nfe", "kid_lite0")}
    assert said["blocks"] == (
        "Spending on blocks helps (better in 2 of 3 comparisons, worse in 1), "
        "but the same network evaluations bought more elsewhere"
    )
