"""`mmgen cost`: what it says of plans, and that seconds need a calibration of this machine."""

import json
from pathlib import Path

import pytest

from mmgen.cli.cost import CALIBRATION
from mmgen.cli.main import main

ARGUMENTS = ["--num", "4", "--blocks", "1", "2", "--steps", "2", "--guidance", "2"]


def test_plans_are_priced_and_seconds_come_with_a_calibration(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cost", str(run), *ARGUMENTS]) == 0
    printed = capsys.readouterr().out
    assert "4 pictures" in printed and "--calibrate makes one" in printed
    one, two = (line.split() for line in printed.splitlines() if line.split()[1:3] == ["2", "2"])
    assert [row[0] for row in (one, two)] == ["1", "2"] and [row[3] for row in (one, two)] == ["4", "8"]
    assert float(one[5]) < float(two[5]), "two blocks keep the first one's keys and values"
    assert len(one) == 6
    assert main(["cost", str(run), *ARGUMENTS, "--calibrate", "--batch-sizes", "1", "2"]) == 0
    printed = capsys.readouterr().out
    row = next(line.split() for line in printed.splitlines() if line.split()[1:3] == ["2", "2"])
    assert float(row[6]) > 0 and "--calibrate makes one" not in printed
    more = ["--thinking", "0", "2", "--candidates", "1", "3"]
    assert main(["cost", str(run), *ARGUMENTS, *more]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.split()[1:3] == ["2", "2"]]
    assert len(rows) == 8 and {tuple(row[3:5]) for row in rows} == {
        ("0", "1"),
        ("0", "3"),
        ("2", "1"),
        ("2", "3"),
    }
    assert all(float(row[8]) > 0 for row in rows), "scores and thoughts are of what was timed"
    path = run / CALIBRATION
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "machine": {**record["machine"], "processor": "abacus"}}))
    assert main(["cost", str(run), *ARGUMENTS]) == 2
    assert "calibrate here" in capsys.readouterr().err
    path.unlink()


def test_mistakes_are_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cost", str(run), "--num", "0"]) == 2
    assert "num 0 must be at least 1" in capsys.readouterr().err
    assert main(["cost", str(run), "--blocks", "5"]) == 2
    assert "blocks 5: a picture of 4 rows" in capsys.readouterr().err
