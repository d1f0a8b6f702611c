"""`mmgen report` on what a real `mmgen tradeoff` kept."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mmgen.cli.main import main
from mmgen.cli.report import measurement, names
from tests.evaluation.test_report import embedded


@pytest.fixture(scope="module")
def measured(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        assert main(["tradeoff", str(run), "--num", "8", "--steps", "1", "2", "--guidance", "1", "2"]) == 0
    return run


def test_a_run_becomes_a_page(measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "page.html"
    assert main(["report", str(measured), "--out", str(out)]) == 0
    assert f"{out}: 4 plans of {measured.name}" in capsys.readouterr().out
    record = json.loads((measured / "tradeoff" / "tradeoff.json").read_text())
    (run,) = embedded(out.read_text())["runs"]
    assert run["prompts"] == record["prompts"] and run["picture"] == [16, 16]
    assert [axis["name"] for axis in run["axes"]] == ["blocks", "steps", "guidance"]
    assert all(row["picture"].startswith("data:image/png;base64,") for row in run["rows"])
    for row, kept in zip(run["rows"], record["rows"], strict=True):
        assert row["reported"]["kid_lite0"][0] == kept["reported"]["kid_lite0"]["value"]
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]


def test_the_hits_are_those_of_the_reported_half(measured: Path) -> None:
    found = measurement(measured / "tradeoff", "run")
    assert set(found.hits) == {
        (row, name) for row in range(4) for name in ("own_latent", "own_lite0", "concept_lite0")
    }
    for (index, figure), hits in found.hits.items():
        reported = found.record["rows"][index]["reported"][figure]
        assert len(hits) == reported["num"] and sum(hits) / len(hits) == reported["value"]


def test_each_plan_has_its_own_pictures(measured: Path, tmp_path: Path) -> None:
    # the run is too young for its pictures to differ, so each strip is made to say which file it is
    folder = shutil.copytree(measured / "tradeoff", tmp_path / "copy")
    for path in (folder / "pictures").iterdir():
        path.write_text(path.name)
    found = measurement(folder, "run")
    for index, row in enumerate(found.record["rows"]):
        name = f"blocks{row['blocks']}-steps{row['steps']}-guidance{row['guidance']:g}-"
        assert found.pictures[index].decode().startswith(name)


def test_folders_of_tradeoff_compare_and_get_names_of_their_own(measured: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(measured / "tradeoff", copy)
    shutil.rmtree(copy / "pictures")
    (copy / "tradeoff.jsonl").unlink()
    out = tmp_path / "page.html"
    assert main(["report", str(measured), str(copy), "--out", str(out)]) == 0
    data = embedded(out.read_text())
    assert [run["name"] for run in data["runs"]] == [measured.name, "copy"] and data["comparable"]
    assert data["runs"][1]["picture"] is None
    assert names([Path("a/run"), Path("b/run/tradeoff")]) == ["a/run", "b/run"]


def test_mistakes_are_one_line(
    measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", "nowhere"]) == 2
    assert "nowhere has no tradeoff.json: `mmgen tradeoff nowhere` measures first" in capsys.readouterr().err
    assert main(["report", str(measured), str(measured / "tradeoff")]) == 2
    assert "a run is named twice" in capsys.readouterr().err
    assert main(["report", str(measured), "--out", str(tmp_path)]) == 2
    assert f"--out {tmp_path} is a folder: name the page's file" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert main(["report"]) == 2
    (tmp_path / "tradeoff.json").write_text('{"rows": 3}')
    assert main(["report", "."]) == 2
    assert "tradeoff.json is not what `mmgen tradeoff` writes" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [{"seconds": None}, {"plan": 3}, {"reported": {"kid_lite0": 0.5}}, {"choosing": None}],
    ids=lambda change: next(iter(change)),
)
def test_a_record_that_is_broken_is_named(
    measured: Path, tmp_path: Path, change: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads((measured / "tradeoff" / "tradeoff.json").read_text())
    record["rows"][1] |= change
    (tmp_path / "tradeoff.json").write_text(json.dumps(record))
    out = tmp_path / "page.html"
    assert main(["report", str(tmp_path), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "tradeoff.json is not what `mmgen tradeoff` writes" in error and error.count("\n") == 1
    assert not out.exists()
    assert not (tmp_path / "report.html").exists()
