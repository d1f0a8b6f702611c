"""`mmgen evaluate` on a real run: what it prints, what it leaves in the run's folder, and what it refuses."""

import json
from pathlib import Path

import pytest

from mmgen.cli.evaluate import main


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_figures_are_printed_and_kept(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--num", "4", "--steps", "1", "2", "--guidance", "1.5", "--seed", "3"]) == 0
    printed = capsys.readouterr().out
    assert "seen: 4 prompts, guidance 1.5" in printed and "test: 4 prompts" in printed
    assert "KID-lite0" in printed and "2 steps" in printed and "bits per byte" in printed
    record = json.loads((run / "evaluation.json").read_text())
    assert record["config"] == {"steps": [1, 2], "guidance": 1.5, "num": 4, "seed": 3, "splits": []}
    assert [(row["split"], row["source"], row["steps"]) for row in record["rows"]] == [
        (split, source, steps)
        for split in ("seen", "test")
        for source, steps in (("real", None), ("codec", None), ("model", 1), ("model", 2))
    ]
    estimate = record["rows"][2]["figures"]["kid_lite0"]
    assert estimate["low"] <= estimate["value"] <= estimate["high"]


def test_a_checkpoint_is_evaluated_into_its_run(run: Path) -> None:
    (run / "evaluation.json").unlink(missing_ok=True)
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert main([str(checkpoint), "--num", "4", "--steps", "1", "--split", "test"]) == 0
    assert {row["split"] for row in json.loads((run / "evaluation.json").read_text())["rows"]} == {"test"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split", "tset"], "no split 'tset', only seen, test"),
        (["--steps", "0"], "steps"),
        (["--num", "1"], "num 1"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_write_nothing(run: Path, arguments: list[str], message: str) -> None:
    (run / "evaluation.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=message):
        main([str(run), *arguments])
    assert not (run / "evaluation.json").exists()


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no checkpoint"):
        main([str(tmp_path)])
