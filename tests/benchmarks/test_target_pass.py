"""The benchmark of the target pass: what it expects and counts is of the batches that it times."""

import pytest

from benchmarks.target_pass import Arguments, measure


def test_expected_and_counted_ratios() -> None:
    rows = list(measure(Arguments(seeds=1, quick=True, documents=4)))
    assert len(rows) == 9
    for row in rows:
        forwards = 4 if row["checkpointing"] == "full" else 3
        assert row["expected"] == pytest.approx(1 + row["rho"] / forwards)
        # noisy tokens read more keys than clean ones and pass the head; of one context all the more
        assert row["expected"] < row["counted"] < row["expected"] + 0.1
    by_case = {(row["checkpointing"], row["copies"], round(row["rho"], 1)): row for row in rows}
    for rho in (0.2, 0.5, 0.8):
        assert by_case["none", 4, rho]["rho"] == pytest.approx(rho, abs=0.01)
        assert by_case["full", 1, rho]["counted"] < by_case["none", 1, rho]["counted"]
