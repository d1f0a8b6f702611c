"""The benchmark of joint tokens: what its rows say, its figure, and that the page quotes the committed results."""

import json
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.harness import RESULTS, ROOT
from benchmarks.joint_tokens import BY_HAND, Arguments, measure
from mmgen.evaluation.intervals import Estimate

PICTURE = ROOT / "docs" / "images" / "joint_tokens.png"
MOST_BYTES = 150_000
NOTHING = 1e-4  # bits


def committed(claim: str) -> dict[tuple[str, str], dict]:
    """By case and head."""
    record = json.loads((RESULTS / "joint_tokens.json").read_text())
    assert record["arguments"]["seeds"] == 3 and not record["arguments"]["quick"]
    found = {}
    for row in record["rows"]:
        if row["claim"] == claim:
            estimates = {key: Estimate(**x) for key, x in row.items() if isinstance(x, dict)}
            found[row["case"], row["head"]] = {**row, **estimates}
    return found


def shown(value: Estimate) -> str:
    if value.high < NOTHING:
        return f"below {value.high:.0e}"
    return f"{value.value:.3f}" if value.high - value.low < 2e-3 else f"{value:.3f}"


def page_lines() -> list[str]:
    """The lines of the page's tables, from the committed results."""
    lines, passes = [], committed("J3")
    for (case, head), row in committed("J1").items():
        kept = shown(passes[case, head]["value"])
        lines.append(f"| {head} | {shown(row['value'])} | {shown(row['real_mass'])} | {kept} |")
    rows = {key: row for key, row in committed("J2").items() if key[1] != BY_HAND}
    cases = list(dict.fromkeys(case for case, _ in rows))
    for head in [head for case, head in rows if case == cases[-1]]:
        cells = [shown(rows[case, head]["value"]) if (case, head) in rows else "" for case in cases]
        kept = passes.get((cases[2], head))
        lines.append(f"| {head} | {' | '.join(cells)} | {shown(kept['value']) if kept else ''} |")
    return lines


def test_the_page_quotes_the_committed_results() -> None:
    page = (ROOT / "docs" / "joint_tokens.md").read_text()
    lines = page_lines()
    assert len(lines) == 6 + 7
    assert [line for line in lines if line not in page] == []
    assert f"images/{PICTURE.name}" in page and "python -m benchmarks.joint_tokens" in page
    assert PICTURE.stat().st_size < MOST_BYTES


def test_the_committed_results_bear_the_claims() -> None:
    left = {
        "independent": (2.0, 0.25),
        "mixture, 2 components": (1.0, 0.5),
        "mixture, 3 components": (0.5, 0.75),
    }
    for (_, head), row in committed("J1").items():
        bits, mass = left.get(head, (0.0, 1.0))
        assert row["value"].value == pytest.approx(bits, abs=NOTHING)
        assert row["real_mass"].value == pytest.approx(mass, abs=NOTHING)
    for (case, head), row in committed("J2").items():
        if head == BY_HAND:
            assert abs(row["value"]) < 1e-12 and row["real_mass"] == pytest.approx(1, abs=1e-12)
            continue
        num_bits = int(case.split()[0])
        if head == "independent":
            assert row["value"].value == pytest.approx(1, abs=NOTHING)
        elif head.startswith("mixture") and int(head.split()[1]) < 2 ** (num_bits - 1):
            assert row["value"].low > 0.5
        else:
            assert row["value"].high < NOTHING
    for (case, head), row in committed("J3").items():
        exact = head in ("hidden Markov, 4 states", "chain")
        most = 2 if case == "poker hands" else 4
        assert row["value"].value == pytest.approx(most, abs=0.01) if exact else row["value"].value <= most


@pytest.mark.slow
def test_it_measures_and_draws(tmp_path: Path) -> None:
    """On short strings and with few beginnings: what needs no luck holds."""
    picture = tmp_path / "figure" / "joint_tokens.png"
    rows = measure(Arguments(seeds=1, quick=True, picture=picture))
    value = {(row["claim"], row["case"], row["head"]): row["value"] for row in rows}
    assert len(value) == len(rows)
    assert value["J1", "poker hands", "independent"].value == pytest.approx(2, abs=1e-3)
    assert value["J1", "poker hands", "chain"].value < 1e-2
    assert value["J2", "3 bits, even parity", "mixture, 2 components"].value > 0.8
    assert value["J3", "poker hands", "independent"].value == pytest.approx(1.25, abs=1e-2)
    with Image.open(picture) as image:
        assert image.size == (1265, 792) and len(set(image.convert("L").tobytes())) > 20
    assert picture.stat().st_size < MOST_BYTES
