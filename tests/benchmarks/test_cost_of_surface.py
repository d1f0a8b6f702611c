"""Predicted seconds against a surface's: what is missing is named, and what is claimed of the committed results."""

import json
from pathlib import Path

import pytest

from benchmarks.cost_of_surface import Arguments
from benchmarks.harness import ROOT


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tradeoff/latency.json is missing: `mmgen tradeoff`"):
        Arguments(run=tmp_path)


def test_the_committed_results_bear_the_claim() -> None:
    rows = json.loads((ROOT / "benchmarks/results/cost_of_surface.json").read_text())["rows"]
    assert {(row["thoughts"], row["candidates"]) for row in rows if "thoughts" in row} == {
        (False, 1), (False, 4), (True, 1), (True, 4)
    }  # fmt: skip
    assert all(row["error_median"] <= 0.15 and row["error_90"] <= 0.3 for row in rows)
