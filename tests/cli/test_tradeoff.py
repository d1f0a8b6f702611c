"""`mmgen tradeoff` on a real run: what it keeps, that it goes on where it was cut, and what it refuses."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mmgen.cli import tradeoff
from mmgen.cli.main import main
from mmgen.config import save_yaml
from mmgen.evaluation import store
from mmgen.training.metrics import LogConfig
from mmgen.training.run import load_run_config

SCALAR = io.BytesIO()
np.save(SCALAR, np.float16(0))
ARGUMENTS = ["--num", "8", "--steps", "1", "2", "--guidance", "1", "2"]


@pytest.fixture(scope="module")
def out(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tradeoff") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder.parent / "cache"))
        assert main(["tradeoff", str(run), *ARGUMENTS, "--out", str(folder)]) == 0
    return folder


def test_every_picture_has_a_line_and_every_plan_a_row(out: Path) -> None:
    header, *lines = [json.loads(line) for line in (out / "tradeoff.jsonl").read_text().splitlines()]
    assert header["num"] == 8 and header["split"] == "test" and len(lines) == 4 * 8
    assert len({line["key"] for line in lines}) == 8
    record = json.loads((out / "tradeoff.json").read_text())
    assert [(row["steps"], row["guidance"]) for row in record["rows"]] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert [row["nfe"] for row in record["rows"]] == [1, 2, 2, 4]
    assert sum(row["chosen"] for row in record["rows"]) == 2
    assert (
        record["rows"][0]["reported"]["kid_lite0"]["low"] < record["rows"][0]["reported"]["kid_lite0"]["high"]
    )
    assert record["scorer"] == "none" and "score" not in lines[0] and lines[0]["memory"] > 0
    (text,) = record["text"]
    assert text["source"] == "captions" and text["tokens_per_pass"] == 1 and text["kept"]["value"] == 1
    assert text["bits_per_byte"]["low"] < text["bits_per_byte"]["value"] < text["bits_per_byte"]["high"]
    assert len(list((out / "features").iterdir())) - 1 == len(list((out / "pictures").iterdir())) == 4
    assert (out / "features" / "real.npy").is_file()


def test_what_is_there_is_not_drawn_again_and_what_was_cut_is(
    out: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = json.loads((out / "tradeoff.json").read_text())
    path = out / "tradeoff.jsonl"
    path.write_text(path.read_text()[:-40])  # in the middle of the last plan's last line
    drawn = []
    measure = tradeoff.Judge.measure

    def record(self, sampler, plan, seed, on_batch):
        drawn.append(plan)
        return measure(self, sampler, plan, seed, on_batch)

    monkeypatch.setattr(tradeoff.Judge, "measure", record)
    assert main(["tradeoff", str(run), *ARGUMENTS, "--out", str(out)]) == 0
    assert [(plan.steps, plan.guidance) for plan in drawn] == [(2, 2.0)]
    after = json.loads((out / "tradeoff.json").read_text())
    assert [row["reported"] for row in after["rows"]] == [row["reported"] for row in before["rows"]]
    assert len(path.read_text().splitlines()) == 33
    said = capsys.readouterr().err.splitlines()
    assert said == [f"plan {n} of 4: blocks 1, steps {s}, guidance {g}, thinking 0, candidates 1"
                    for n, (s, g) in enumerate([(1, 1), (1, 2), (2, 1), (2, 2)], 1)]  # fmt: skip
    (out / "tradeoff.json").unlink()
    monkeypatch.setattr(tradeoff, "text_surface", None)
    assert main(["tradeoff", str(run), *ARGUMENTS, "--out", str(out)]) == 0 and len(drawn) == 1
    assert json.loads((out / "tradeoff.json").read_text()) == after, "nothing is measured twice"
    assert main(["tradeoff", str(run), *ARGUMENTS, "--seed", "1", "--out", str(out)]) == 2
    assert "has seed 0, not 1: name another folder" in capsys.readouterr().err


@pytest.mark.slow
def test_the_surface_is_a_table_of_the_runs_page_at_wandb(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    config = replace(load_run_config(copy), log=LogConfig(wandb_project="mmgen-test", wandb_mode="offline"))
    save_yaml(config, copy / "config.yaml")
    few = ["--num", "8", "--steps", "1", "--guidance", "1"]
    assert main(["tradeoff", str(copy), *few]) == 0
    name = (copy / "wandb_run").read_text()
    (table,) = copy.glob(f"wandb/offline-run-*-{name}/files/media/table/surface_*.json")
    content = json.loads(table.read_text())
    assert content["columns"][:3] == ["blocks", "steps", "guidance"] and "kid_lite0" in content["columns"]
    assert [row[:3] for row in content["data"]] == [[1, 1, 1]]


def test_more_axes_and_a_scorer_are_asked_for_by_name(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    few = ["--num", "8", "--steps", "1", "--guidance", "1", "--out", str(tmp_path / "out")]
    more = ["--candidates", "1", "3", "--axis", "shift=0.5,1", "--scorer", "likelihood"]
    assert main(["tradeoff", str(run), *few, *more]) == 0
    record = json.loads((tmp_path / "out" / "tradeoff.json").read_text())
    axes = [(row["candidates"], row["plan"]["shift"], row["nfe"]) for row in record["rows"]]
    assert axes == [(1, 0.5, 1), (1, 1.0, 1), (3, 0.5, 3), (3, 1.0, 3)]
    assert all(row["chosen"] for row in record["rows"])
    lines = [json.loads(line) for line in (tmp_path / "out" / "tradeoff.jsonl").read_text().splitlines()[1:]]
    scores = {
        (line["plan"]["candidates"], line["plan"]["shift"], line["key"]): line["score"] for line in lines
    }
    for _, shift, key in scores:
        assert scores[3, shift, key] >= scores[1, shift, key] - 1e-3, (
            "the best of three has the first among them"
        )
    for words, message in (
        (["--axis", "shift"], "--axis 'shift' must be NAME=VALUE,VALUE"),
        (["--axis", "shfit=1"], "shift"),
        (["--axis", "shift=far"], "shift"),
        (["--blocks", "5"], "blocks 5: a picture of 4 rows"),
        (
            ["--level", "group"],
            "the split 'test' has 0 pictures with a caption 'group', at least 8 are needed",
        ),
    ):
        assert main(["tradeoff", str(run), *few, *words]) == 2
        assert message in capsys.readouterr().err


def test_a_budget_buys_a_measured_plan(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    draw = ["sample", str(run), "--prompt", "red", "--out", str(tmp_path / "x.png")]
    assert main([*draw, "--budget", "2nfe"]) == 2
    assert "tradeoff.json is missing: `mmgen tradeoff RUN`" in capsys.readouterr().err
    assert main(["tradeoff", str(run), *ARGUMENTS]) == 0
    assert main([*draw, "--budget", "1nfe"]) == 0
    printed = capsys.readouterr().out
    assert "plan: blocks 1, steps 1, guidance 1; when measured" in printed
    assert "cost: 1 network evaluations" in printed
    assert main([*draw, "--budget", "1nfe", "--steps", "4"]) == 2
    assert "--budget chooses the plan: leave out --steps" in capsys.readouterr().err
    for words, message in (
        (["--precision", "bf16"], "was measured of precision float32, not bf16"),
        (["--weights", "model"], "was measured of weights ema, not model"),
        (["--size", "8", "24"], "--budget knows pictures of 16 16 alone: leave out --size"),
    ):
        assert main([*draw, "--budget", "1nfe", *words]) == 2
        assert message in capsys.readouterr().err


def test_seconds_are_timed_in_turns_once_on_a_machine(
    out: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And again where the machine is another, or a plan is new."""
    record = json.loads((out / "tradeoff.json").read_text())
    kept = json.loads((out / "latency.json").read_text())
    assert [each["plan"] for each in kept["plans"]] == [row["plan"] for row in record["rows"]]
    assert [each["seconds"] for each in kept["plans"]] == [row["seconds"] for row in record["rows"]]
    timed = []
    measure = store.measure_latencies

    def watched(sampler, prompts, plans, *more):
        timed.append(len(plans))
        return measure(sampler, prompts, plans, *more)

    monkeypatch.setattr(store, "measure_latencies", watched)
    again = ["tradeoff", str(run), *ARGUMENTS, "--out", str(out)]
    assert main(again) == 0 and timed == []
    assert main([*again, "--steps", "1", "2", "3"]) == 0 and timed == [6]
    kept["machine"]["threads"] += 1
    (out / "latency.json").write_text(json.dumps(kept))
    assert main(again) == 0 and timed == [6, 4]


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(
            lambda lines: [*lines, "[1, 2]", "3", "{}", '{"plan": 3, "key": 1}', "", "\0"], id="lines"
        ),
        pytest.param(lambda lines: [*lines[:-1], "\udcff" + lines[-1]], id="no text"),
        pytest.param(lambda lines: [line.replace('"memory": ', '"memroy": ') for line in lines], id="cost"),
        pytest.param(
            lambda lines: [lines[0].replace('"precision": "float32", ', ""), *lines[1:]], id="older"
        ),
    ],
)
def test_lines_that_say_nothing_are_left_out_and_their_plans_measured_again(
    out: Path, run: Path, broken
) -> None:
    path = out / "tradeoff.jsonl"
    wanted = path.read_text()
    path.write_text("\n".join(broken(wanted.splitlines())) + "\n", errors="surrogateescape")
    assert main(["tradeoff", str(run), *ARGUMENTS, "--out", str(out)]) == 0
    before, after = (
        {(str(row["plan"]), row["key"]): {**row, "seconds": 0, "score_seconds": 0}
         for row in map(json.loads, text.splitlines()[1:])}
        for text in (wanted, path.read_text())
    )  # fmt: skip
    assert len(after) >= 32 and all(before[key] == row for key, row in after.items())
    assert main(["report", str(out), "--out", str(out / "report.html")]) == 0


@pytest.mark.parametrize(
    "content", [None, b"", b"\x93NUMPY\x01\0", SCALAR.getvalue()], ids=["gone", "empty", "cut", "scalar"]
)
def test_features_that_are_gone_or_cut_are_made_again(out: Path, run: Path, content: bytes | None) -> None:
    path = next(each for each in sorted((out / "features").iterdir()) if each.name != "real.npy")
    wanted = path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes(content)
        assert main(["report", str(out), "--out", str(out / "report.html")]) == 0
    assert main(["tradeoff", str(run), *ARGUMENTS, "--out", str(out)]) == 0
    assert path.read_bytes() == wanted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "", "does not say what it was measured of"),
        (lambda text: text[20:], "does not say what it was measured of"),
        (lambda text: "[]\n" + text, "has checkpoint None"),
        (
            lambda text: "\n".join([text.split("\n")[0], *text.split("\n")[:0:-1]]),
            "has its prompts in another order",
        ),
        (
            lambda text: text.replace('"key": "', '"key": "other-'),
            "has pictures that are not of these prompts",
        ),
    ],
)
def test_a_folder_of_something_else_is_left_as_it_is(
    out: Path, run: Path, change, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = out / "tradeoff.jsonl"
    wanted = path.read_text()
    path.write_text(change(wanted))
    assert main(["tradeoff", str(run), *ARGUMENTS, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert message in error and str(path) in error and error.count("\n") == 1
    assert path.read_text() == change(wanted)
    path.write_text(wanted)
