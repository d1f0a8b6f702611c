"""The harness: what it writes, that seeds give intervals, and that timing in turns sees through a slow machine."""

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks import harness
from mmgen.evaluation.intervals import Estimate


@dataclass(frozen=True)
class Arguments(harness.Arguments):
    length: int = 8
    """Tokens."""


def measure(arguments: Arguments) -> list[harness.Row]:
    if arguments.length < 1:
        raise ValueError(f"length must be at least 1, is {arguments.length}")
    estimate = harness.over_seeds([float(seed) for seed in range(arguments.seeds)])
    return [{"what": "a", "value": estimate}, {"what": "b", "value": 0.123456, "extra": math.nan}]


def test_a_run_writes_what_was_measured_where_and_with_what(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = harness.run(
        "probe", Arguments, measure, "First.\n\nMore.", ["--out", str(tmp_path / "o.json"), "--seeds", "2"]
    )
    record = json.loads(out.read_text())
    assert record["name"] == "probe" and record["what"] == "First."
    assert record["arguments"] == {"seeds": 2, "out": None, "quick": False, "length": 8}
    assert record["rows"][0]["value"]["value"] == 0.5 and record["rows"][0]["value"]["num"] == 2
    assert record["rows"][1] == {"what": "b", "value": 0.123456, "extra": None}
    assert (
        record["machine"]["cores"] >= 1 and record["machine"]["processor"] and "torch" in record["versions"]
    )
    assert record["revision"].keys() == {"commit", "changed"}
    shown = capsys.readouterr().out
    assert "probe" in shown and "0.1235" in shown and "o.json" in shown
    assert [path.name for path in tmp_path.iterdir()] == ["o.json"]


def test_a_run_that_is_cut_leaves_what_it_measured(tmp_path: Path) -> None:
    out, part = tmp_path / "o.json", tmp_path / "o.json.part"

    def cut(arguments: Arguments) -> Iterator[harness.Row]:
        yield {"what": "a"}
        assert [row["what"] for row in json.loads(part.read_text())["rows"]] == ["a"]
        yield {"what": "b"}
        raise MemoryError

    with pytest.raises(MemoryError):
        harness.run("probe", Arguments, cut, None, ["--out", str(out)])
    assert [row["what"] for row in json.loads(part.read_text())["rows"]] == ["a", "b"] and not out.exists()
    harness.run("probe", Arguments, lambda arguments: iter(measure(arguments)), None, ["--out", str(out)])
    assert len(json.loads(out.read_text())["rows"]) == 2 and not part.exists()


@pytest.mark.parametrize("argv", [["--lenght", "3"], ["--seeds", "0"], ["--length", "0"]])
def test_mistakes_are_one_line_and_write_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        harness.run("probe", Arguments, measure, None, [*argv, "--out", str(tmp_path / "o.json")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("python -m benchmarks.probe: error: ")
    assert error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_seeds_give_students_interval() -> None:
    estimate = harness.over_seeds([1.0, 2.0, 3.0])
    half = (
        4.302652729911275 * 1 / math.sqrt(3)
    )  # t with 2 degrees of freedom; the normal's 1.96 is far too narrow
    assert estimate.num == 3 and estimate.value == 2
    assert (estimate.low, estimate.high) == pytest.approx((2 - half, 2 + half))
    one = harness.over_seeds([5.0])
    assert one.value == 5 and math.isnan(one.low) and math.isnan(one.high)


def test_pairs_see_through_a_machine_that_slows_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """`a` takes 1.5 times as long as `b`, on a clock that runs ten times slower in the second half."""
    now, calls = 0.0, 0

    def work(units: float) -> Callable[[], None]:
        def call() -> None:
            nonlocal now, calls
            calls += 1
            now += units * (1 if calls <= 2 * 2 + 20 else 10)

        return call

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    result = harness.compare(work(1.5), work(1.0), repeats=20)
    assert (result.ratio.value, result.ratio.low, result.ratio.high) == pytest.approx((1.5, 1.5, 1.5))
    assert result.ratio.num == 20
    # All of `a`, then all of `b`, would have said 0.15.
    assert result.a / result.b == pytest.approx(1.5)


def test_the_order_within_pairs_changes() -> None:
    order: list[str] = []
    harness.compare(lambda: order.append("a"), lambda: order.append("b"), repeats=4, warmup=0)
    assert "".join(order) == "abbaabba"
    with pytest.raises(ValueError, match="repeats must be at least 2"):
        harness.compare(lambda: None, lambda: None, repeats=1)


def test_the_table_has_a_column_for_every_key() -> None:
    table = harness.table("t", [{"a": "x", "b": 1}, {"a": "y", "c": Estimate(1.0, 0.5, 1.5, 3)}])
    assert [column.header for column in table.columns] == ["a", "b", "c"]
    assert [column.justify for column in table.columns] == ["left", "right", "right"]
    assert list(table.columns[2].cells) == ["", "1 [0.5, 1.5]"]
