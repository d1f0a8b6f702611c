"""What pages quote of `benchmarks/results`: rows of a record, figures as pages write them, lines that are not there."""

import json
from collections.abc import Sequence
from typing import Any

from benchmarks.harness import RESULTS, ROOT


def rows(name: str) -> list[dict[str, Any]]:
    record = json.loads((RESULTS / f"{name}.json").read_text())
    assert not record["arguments"]["quick"]
    return record["rows"]


def bare(value: float, digits: int) -> str:
    """So many digits after the point, without a zero before it."""
    return f"{value:.{digits}f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.{digits}f}"


def span(values: Sequence[float], digits: int) -> str:
    """The least and the greatest; one figure where they are written alike."""
    low, high = (bare(extreme(values), digits) for extreme in (min, max))
    return low if low == high else f"{low} to {high}"


def interval(found: dict[str, float], digits: int) -> str:
    value, low, high = (bare(found[name], digits) for name in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def missing(page: str, lines: list[str]) -> list[str]:
    """Which of `lines` the page of `docs/` has not."""
    assert len(lines) == len(set(lines))
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return [line for line in lines if line not in text]
