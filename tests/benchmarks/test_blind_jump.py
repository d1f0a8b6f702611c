"""The benchmark of blind jumps: what its rows say, its figure, and that the page quotes the committed results."""

import json
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.blind_jump import Arguments, measure
from benchmarks.harness import RESULTS, ROOT
from mmgen.evaluation.intervals import Estimate

PICTURE = ROOT / "docs" / "images" / "target_time.png"
MOST_BYTES = 150_000


def committed(claim: str) -> list[dict]:
    record = json.loads((RESULTS / "blind_jump.json").read_text())
    assert record["arguments"]["seeds"] == 3 and not record["arguments"]["quick"]
    rows = [row for row in record["rows"] if row["claim"] == claim]
    return [{**row, "value": Estimate(**row["value"]) if isinstance(row["value"], dict) else row["value"]}
            for row in rows]  # fmt: skip


def page_lines() -> list[str]:
    """The lines of the page's tables, from the committed results."""
    means: dict[tuple[str, str], list[str]] = {}
    for row in committed("T1"):
        name = row["case"].rpartition(",")[0]
        exact = not isinstance(row["value"], Estimate)
        shown = ("0" if row["value"] < 1e-24 else f"{row['value']:.2f}") if exact else f"{row['value']:.3f}"
        means.setdefault((name, row["map"]), []).append(shown)
    lines = [f"| {name} | {arm} | {' | '.join(shares)} |" for (name, arm), shares in means.items()]
    rows = committed("T2")
    for blind, told in zip(rows[::2], rows[1::2], strict=True):
        assert blind["case"] == told["case"]
        least = f"{blind['least']:.4f}" if blind["least"] else "0"
        reached = f"{blind['value']:.4f}" if blind["least"] else f"below {blind['value'].high:.0e}"
        lines.append(f"| {blind['case']} | {least} | {reached} | below {told['value'].high:.0e} |")
    for row in committed("T3"):
        distance = f"{row['value']:.4f}"
        counts = [test.split()[1] for test in row["seeds_that_reject"].split(", ")]
        lines.append(f"| {row['map']} | {distance} | {' | '.join(counts)} |")
    return lines


def test_the_page_quotes_the_committed_results() -> None:
    page = (ROOT / "docs" / "target_time.md").read_text()
    lines = page_lines()
    assert len(lines) == 7 + 7 + 7
    assert [line for line in lines if line not in page] == []
    assert f"images/{PICTURE.name}" in page and "python -m benchmarks.blind_jump" in page
    assert PICTURE.stat().st_size < MOST_BYTES


def test_the_committed_results_bear_the_claims() -> None:
    for row in committed("T1"):
        if row["case"].endswith("1 step"):
            assert row["value"] < 1e-24 if row["map"] == "exact optimum" else row["value"].high < 0.1
    for row in committed("T2"):
        value, least = row["value"], row["least"]
        if row["map"] == "told network" or not least:
            assert value.high < 1e-4
        else:
            assert value.value == pytest.approx(least, rel=0.01) and value.value > least * (1 - 1e-4)
    tests = {row["map"]: row["seeds_that_reject"] for row in committed("T3")}
    assert tests["sign flip (decoy)"] == "variance 0, cubic 0, ks 3, laplace 3"
    assert tests["true map"] == tests["told network"] == "variance 0, cubic 0, ks 0, laplace 0"
    assert tests["blind network, fits the laws"] == "variance 3, cubic 3, ks 3, laplace 3"


@pytest.mark.slow
def test_it_measures_and_draws(tmp_path: Path) -> None:
    """Hardly trained, on few draws: what holds without training holds, and what needs it does not."""
    picture = tmp_path / "figure" / "target_time.png"
    rows = measure(Arguments(seeds=1, steps=2, num=60, picture=picture))
    value = {(row["claim"], row["case"], row["map"]): row["value"] for row in rows}
    assert len(value) == len(rows)
    assert value["T1", "digits, 64-d, 1 step", "exact optimum"] < 1e-24
    assert value["T1", "digits, 64-d, 1 step", "network"] > 0.1
    for row in rows:
        if row["claim"] == "T2":
            assert row["value"] >= row["least"] * (1 - 1e-4)
    assert value["T2", "d = 2, s in {0, 0.5}", "told network"] > 1e-3
    assert value["T3", "d = 1, s in [0, 1]", "sign flip (decoy)"] == pytest.approx(0.062, abs=1e-3)
    with Image.open(picture) as image:
        assert image.size == (1265, 792) and len(set(image.convert("L").tobytes())) > 20
    assert picture.stat().st_size < MOST_BYTES
