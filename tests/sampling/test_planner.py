"""A planner over measurements whose best plans are known."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from mmgen.sampling.plan import Plan
from mmgen.sampling.planner import Budget, Planner


def row(steps: int, guidance: float, kid: float, hits: float, reported: float) -> dict:
    nfe = steps * (1 if guidance == 1 else 2)

    def figures(kid: float) -> dict:
        return {
            "kid_lite0": {"value": kid, "low": kid - 0.1, "high": kid + 0.1, "num": 10},
            "own_latent": {"value": hits, "low": hits, "high": hits, "num": 10},
        }

    plan = asdict(Plan(steps=steps, guidance=guidance, shift=0.5))
    cost = {"nfe": nfe, "flops": 1e9 * nfe, "seconds": 0.01 * nfe}
    return {"plan": plan, **cost, "choosing": figures(kid), "reported": figures(reported)}


ROWS = [
    row(1, 1.0, 0.9, 0.2, 1.0),
    row(1, 2.0, 0.7, 0.5, 0.8),
    row(2, 1.0, 0.8, 0.3, 0.5),
    row(4, 2.0, 0.4, 0.4, 0.6),
]


def test_the_best_plan_within_the_budget_is_chosen_on_one_half_and_promised_by_the_other() -> None:
    planner = Planner(ROWS)
    choice = planner.choose(Budget(nfe=3))
    # two steps are better on the half that reports, which must not choose
    assert choice.plan == Plan(steps=1, guidance=2.0, shift=0.5)
    assert choice.expected == pytest.approx((0.8, 0.7, 0.9))
    assert choice.cost == {"nfe": 2, "flops": 2e9, "seconds": 0.02}
    assert planner.choose(Budget(flops=1e9)).plan.guidance == 1
    assert planner.choose(Budget(seconds=5)).plan.steps == 4
    assert Planner(ROWS, "own_latent").choose(Budget(seconds=5)).plan == Plan(
        steps=1, guidance=2.0, shift=0.5
    )


def test_a_budget_below_the_cheapest_plan_is_refused() -> None:
    with pytest.raises(ValueError, match="budget 5ms is below the cheapest measured plan, which takes 10ms"):
        Planner(ROWS).choose(Budget(seconds=0.005))


@pytest.mark.parametrize("currency", ["seconds", "flops"])
@pytest.mark.parametrize("cost", [0.0274491, 0.01, 1 / 3, 123456.789, 5.5311e8])
def test_what_the_cheapest_is_said_to_take_may_be_asked_for(currency: str, cost: float) -> None:
    planner = Planner([{**ROWS[0], currency: cost}])
    with pytest.raises(ValueError, match="which takes (.*)$") as raised:
        planner.choose(Budget(**{currency: cost * 0.9999}))
    said = str(raised.value).rpartition(" ")[2]
    assert planner.choose(Budget.parse(said)).cost[currency] == cost
    assert Budget.parse(said).amount < 1.01 * cost


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("0.5s", Budget(seconds=0.5)),
        ("20ms", Budget(seconds=0.02)),
        ("8 nfe", Budget(nfe=8)),
        ("3GFLOP", Budget(flops=3e9)),
        ("1gflops", Budget(flops=1e9)),
        ("5e8flop", Budget(flops=5e8)),
        ("1e+9 flops", Budget(flops=1e9)),
    ],
)
def test_budgets_are_read_with_their_unit(text: str, budget: Budget) -> None:
    assert Budget.parse(text) == budget


@pytest.mark.parametrize("text", ["0.5", "s", "-1s", "1.2.3s", "0s", "3 hours"])
def test_a_budget_without_a_number_and_a_unit_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="budget"):
        Budget.parse(text)


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one positive number of flops, seconds or nfe"):
        Budget(nfe=1, seconds=1)
    with pytest.raises(ValueError, match="figure 'fid' was not measured; there are: kid_lite0, own_latent"):
        Planner(ROWS, "fid")
    with pytest.raises(ValueError, match="is missing: `mmgen tradeoff RUN` measures"):
        Planner.load(tmp_path / "tradeoff.json")


@pytest.mark.parametrize(
    "record",
    ["", '{"rows": [{"pl', "[]", "{}", '{"rows": 3}', '{"rows": [3]}',
     json.dumps({"rows": [{key: value for key, value in ROWS[0].items() if key != "choosing"}]}),
     json.dumps({"rows": [{**ROWS[0], "seconds": None}]}), json.dumps({"rows": [], "policies": [{}]})],
)  # fmt: skip
def test_a_record_that_is_broken_is_named(tmp_path: Path, record: str) -> None:
    path = tmp_path / "tradeoff.json"
    path.write_text(record)
    with pytest.raises(
        ValueError, match=r"tradeoff.json is not what `mmgen tradeoff` writes .*: measure again"
    ):
        Planner.load(path)
