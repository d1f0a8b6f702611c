"""The surface benchmark: what its ratios say of known distances, that both arms cost the same, one small run,
and that the page quotes the committed results.
"""

import json

import numpy as np
import pytest

from benchmarks import arms
from benchmarks.harness import ROOT
from benchmarks.surface import Arguments, _ratios, _run, measure


def test_ratios_of_known_distances():
    arguments = Arguments(seeds=3, steps=(1, 2), blocks=(1, 2), weights=(2, 1))
    known = {("one", 1): 2.0, ("surface", 1): 2.2, ("surface", 2): 3.0}
    found = {
        (arm, blocks, steps, seed): np.full(arms.DRAWS + 1, value * (1 + seed))
        for (arm, blocks), value in known.items()
        for steps in (1, 2)
        for seed in range(3)
    }
    rows = {(row["blocks"], row["steps"]): row["ratio"] for row in _ratios(found, arguments)}
    assert rows[1, 1].value == pytest.approx(1.1) and rows[2, 2].value == pytest.approx(1.5)
    assert rows[1, 1].low == pytest.approx(rows[1, 1].high), "seeds are drawn alike for both arms"
    with pytest.raises(ValueError, match="must hold 1"):
        Arguments(blocks=(2, 4))
    with pytest.raises(ValueError, match="weights .* must be one number for each"):
        Arguments(blocks=(1, 4))


def test_reading_finished_blocks_costs_training_something(tmp_path):
    arms.prepare("digits")
    arguments = Arguments(runs=tmp_path)
    flops = {arm: arms.picture_flops(_run(arm, 0, 1, arguments).config()) for arm in ("surface", "one")}
    assert 1.02 < flops["surface"] / flops["one"] < 1.4


@pytest.mark.slow
def test_a_small_run_of_all_of_it(tmp_path):
    rows = measure(
        Arguments(seeds=1, quick=True, runs=tmp_path, blocks=(1, 2), weights=(2, 1), steps=(1,), copies=1)
    )
    assert [(row["arm"], row.get("blocks")) for row in rows[1:]] == [
        ("surface", 1), ("surface", 2), ("one", 1), ("ratio", 1), ("ratio", 2)
    ]  # fmt: skip
    steps = {row["arm"]: row["train_steps"] for row in rows if "train_steps" in row}
    assert steps["surface"] == 20 and 20 < steps["one"] < 28


def test_the_committed_results_bear_the_claim_and_the_page_quotes_them() -> None:
    """At one block the model of several is as good as the one that knows no other; and all that is said of others."""
    page = (ROOT / "docs/surface.md").read_text()
    for name, shown in (("surface", (1, 2, 4)), ("surface_4_2_1", (1, 4)), ("surface_12_3_1", (1, 4))):
        rows = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())["rows"]
        for blocks in shown:
            ratios = [row for row in rows if row.get("arm") == "ratio" and row["blocks"] == blocks]
            found = [row["ratio"] for row in sorted(ratios, key=lambda row: row["steps"])]
            cells = [f"{each['value']:.2f} ({each['low']:.2f} to {each['high']:.2f})" for each in found]
            assert f"| {' | '.join(cells)} |" in page, (name, blocks)
            if name == "surface" and blocks == 1:
                assert max(each["high"] for each in found) <= 1.15
