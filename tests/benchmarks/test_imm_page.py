"""docs/imm.md quotes the committed results: every cell of its tables, intervals with both ends."""

from functools import partial
from typing import Any

from benchmarks import harness
from benchmarks.imm_study import FACTORS
from tests import quotes
from tests.quotes import bare, rows

missing = partial(quotes.missing, "imm.md")


def interval(found: dict[str, float]) -> str:
    return f"{found['value']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


def test_the_study() -> None:
    found = {
        (row["factor"], row["value"], row["steps"]): row["ratio"]
        for row in rows("imm_study")
        if "ratio" in row
    }

    def number(value: float) -> str:
        return f"{value:.2f}" if value < 10 else f"{value:.0f}" if value < 1000 else "thousands"

    lines = []
    for factor, value in dict.fromkeys(key[:2] for key in found):
        assert value in FACTORS[factor]
        each = [found[factor, value, steps] for steps in (1, 2, 8)]
        cells = [f"{number(r['value'])} ({r['low']:.2f} to {number(r['high'])})" for r in each]
        lines.append(f"| {value} | {' | '.join(cells)} |")
    assert missing(lines) == []


def test_the_gradient_in_bfloat16() -> None:
    found: dict[tuple[float, float], list[str]] = {}
    for row in rows("imm_precision"):
        found.setdefault((row["least"], row["k"]), []).append(bare(row["cosine"]["value"], 2))
    lines = [f"| {gap:g} | {k:g} | {' | '.join(cells)} |" for (gap, k), cells in found.items()]
    assert len(lines) == 10 and missing(lines) == []


def test_the_headline() -> None:
    found = rows("headline")
    means = {
        name: [
            harness.over_seeds(
                [row["frechet"] for row in found if (row["objective"], row.get("steps")) == (name, steps)]
            ).value
            for steps in (1, 2, 4, 8, 16, 20, 32)
        ]
        for name in ("imm", "flow_matching")
    }
    lines = [
        f"| {title} | {' | '.join(f'{mean:.3f}'[1:] for mean in means[name])} |"
        for title, name in (("IMM", "imm"), ("flow matching", "flow_matching"))
    ]
    for steps, other in ((1, 2), (1, 4), (2, 8), (2, 16), (2, 20), (4, 20), (8, 20)):
        (row,) = (
            row
            for row in found
            if row["objective"] == "ratio" and (row["steps"], row["flow_matching_steps"]) == (steps, other)
        )
        shown = f"{other}, its best" if other == 20 else str(other)
        lines.append(f"| {steps} | {shown} | {interval(row['frechet_ratio'])} |")
    assert missing(lines) == []
    assert min(means["flow_matching"]) == means["flow_matching"][-2], "20 is flow matching's best"


def test_fashion() -> None:
    found: dict[tuple[str, int], list[float]] = {}
    for row in rows("headline_fashion"):
        if row["objective"] in ("imm", "flow_matching"):
            found.setdefault((row["objective"], row["steps"]), []).append(row["frechet"])
    means = {key: sum(values) / len(values) for key, values in found.items()}
    lines = [
        f"| {title} | {' | '.join(f'{means[name, steps]:.1f}' for steps in (1, 2, 4, 8, 20))} |"
        for title, name in (("IMM", "imm"), ("flow matching", "flow_matching"))
    ]
    for steps, other in ((1, 2), (2, 8), (2, 20), (8, 20)):
        imm, flow = found["imm", steps], found["flow_matching", other]
        ratio = means["imm", steps] / means["flow_matching", other]
        adds = [(a - ratio * b) / means["flow_matching", other] for a, b in zip(imm, flow, strict=True)]
        half = harness.over_seeds(adds).high
        lines.append(f"| {steps} | {other} | {ratio:.2f} ({ratio - half:.2f} to {ratio + half:.2f}) |")
    assert missing(lines) == []


def test_emoji() -> None:
    found = rows("emoji")

    def cell(objective: str, row: dict[str, Any], steps: int, shift: float, solver: str) -> str:
        """Means over seeds of the plan that was compared: KID and hits."""
        wanted = (objective, row["level"], row["guidance"], steps, shift, solver)
        keys = ("objective", "level", "guidance", "steps", "shift", "solver")
        each = [own for own in found if tuple(own.get(key) for key in keys) == wanted]
        assert len(each) == 3, "a row for each seed"
        kid, hit = (sum(own[name]["value"] for own in each) / 3 for name in ("kid", "hit"))
        return f"{bare(kid, 3)}, {bare(hit, 2)}"

    lines = []
    for level, title in (
        ("name", "concept (up to six pictures)"),
        ("group", "group (dozens)"),
        ("name_style", "concept and style (one)"),
        ("tags", "tags (one)"),
    ):
        for guidance in (1.0, 2.0):
            two, many = (
                next(
                    row
                    for row in found
                    if row["objective"] == "less steps"
                    and (row["level"], row["guidance"], row["flow_matching_steps"])
                    == (level, guidance, steps)
                )
                for steps in (2, 16)
            )
            flow = [
                cell("flow_matching", row, steps, row["flow_matching_shift"], row["flow_matching_solver"])
                for row, steps in ((two, 2), (many, 16))
            ]
            differences = [quotes.interval(row["kid_difference"], 3) for row in (two, many)]
            cells = [cell("imm", two, 2, two["shift"], "euler"), *flow, *differences]
            lines.append(f"| {title if guidance == 1 else ''} | {guidance:g} | {' | '.join(cells)} |")
    lines = [line.replace("|  |", "| |") for line in lines]
    assert missing(lines) == []


def test_the_second_pass() -> None:
    found = {(row["checkpointing"], row["copies"], row["rho"]): row for row in rows("target_pass")}
    lines = []
    for title, checkpointing, copies in (
        ("a copy of each picture", "none", 1),
        ("four particles of one context", "none", 4),
        ("full checkpointing", "full", 1),
    ):
        each = [found[checkpointing, copies, rho] for rho in (0.2, 0.5, 0.8)]
        lines += [
            f"| {title} | {' | '.join(interval(row['imm_over_fm']) for row in each)} |",
            f"| {title}, a second whole forward | "
            f"{' | '.join(interval(row['whole_forward_over_fm']) for row in each)} |",
        ]
    assert missing(lines) == []
