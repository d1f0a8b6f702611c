"""Rows on disk are the truth: flushed, cut back on resume, the same on a terminal and under nohup."""

import io
import json
import math
import re
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from mmgen.training.metrics import LogConfig, Meters, MetricsFile, Reporter, read_metrics


def test_meters_weigh_by_count_and_start_anew() -> None:
    meters = Meters()
    meters.add("text_loss", torch.tensor(6.0, requires_grad=True), torch.tensor(3))
    meters.add("text_loss", 2.0, 1)
    meters.add("image_loss", torch.tensor(0.0), 0)
    assert meters.read() == {"text_loss": 2.0}  # the mean of means would be 2 and 2, by count 8 / 4
    meters.add("text_loss", 5.0, 10)
    meters.add("text_loss", 1.0, 2)
    assert meters.read() == {"text_loss": 0.5}
    assert meters.read() == {}


def test_rows_are_on_disk_at_once_and_a_resume_drops_later_ones(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    for step in (1, 2, 3, 4):
        metrics.write(step, {"loss": 1 / step, "bad": math.nan})
        assert read_metrics(path)[-1]["step"] == step
    del metrics
    with open(path, "a") as file:
        file.write('{"step": 5, "lo')  # killed within a line
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4]
    metrics = MetricsFile(path, step=3)
    metrics.write(4, {"loss": 9})
    metrics.close()
    assert [(row["step"], row["loss"]) for row in read_metrics(path)] == [
        (1, 1.0),
        (2, 0.5),
        (3, 1 / 3),
        (4, 9),
    ]
    MetricsFile(path).close()
    assert read_metrics(path) == [] == read_metrics(tmp_path / "absent.jsonl")


@pytest.mark.parametrize("line", ["no json", "[1]", '{"loss": 1}', '{"step": "x"}'])
def test_a_foreign_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "m.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(ValueError, match="m.jsonl, line 2: not a row of metrics"):
        read_metrics(tmp_path / "m.jsonl")


def report(run: Path, terminal: bool, step: int = 0, config: LogConfig | None = None) -> str:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=100 if terminal else 20)
    with Reporter(
        run, config or LogConfig(), total_steps=10, step=step, seen={"samples": step * 4}, console=console
    ) as reporter:
        for now in range(step + 1, step + 3):
            reporter.advance(now, {"samples": now * 4})
            values = {"loss": 1.5, "text_loss": 1.0, "image_loss": 0.5, "grad_norm": 2.0, "lr": 1e-3}
            reporter.row(now, {"samples": now * 4, "tokens": now * 4000}, values)
        reporter.say("saved [bold]runs/x[/bold]")
    return screen.getvalue()


def test_without_a_terminal_each_row_is_one_plain_line(tmp_path: Path) -> None:
    lines = report(tmp_path, terminal=False).splitlines()
    assert len(lines) == 3 and lines[2] == "saved [bold]runs/x[/bold]"
    assert lines[0].startswith("step 1/10  loss 1.5  text_loss 1  image_loss 0.5  grad_norm 2  lr 0.001")
    assert "samples/s" in lines[0] and lines[0].endswith("left") and "\x1b" not in "".join(lines)


def test_on_a_terminal_one_line_lives(tmp_path: Path) -> None:
    shown = report(tmp_path, terminal=True)
    assert "\x1b" in shown and "2/10" in shown and "image_loss 0.5" in shown
    assert "samples/s" in shown and "left" in shown and "saved [bold]runs/x[/bold]" in shown
    assert all(each in shown for each in ("tokens/s", "wait 0%", "GB", "grad_norm 2"))


def test_rows_are_the_same_either_way_and_a_resumed_run_reads_as_one(tmp_path: Path) -> None:
    for name, terminal in (("a", True), ("b", False)):
        report(tmp_path / name, terminal)
        report(tmp_path / name, terminal, step=1)
    a, b = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("a", "b"))
    assert [row["step"] for row in a] == [row["step"] for row in b] == [1, 2, 3]
    assert a[0].keys() == b[0].keys()
    assert (
        list(a[0])[:4] == ["step", "samples", "tokens", "loss"]
        and a[0]["samples"] == 4
        and a[0]["tokens_per_second"] == pytest.approx(1000 * a[0]["samples_per_second"], rel=1e-3)
    )
    assert a[0]["memory_gb"] > 0.05 and a[0]["data_wait"] == 0 and "mfu" not in a[0]


def test_waiting_and_work_are_shares_of_the_time_between_rows(tmp_path: Path) -> None:
    with Reporter(
        tmp_path, LogConfig(), total_steps=4, peak=1e6, console=Console(file=io.StringIO())
    ) as report:
        for step in (1, 2):
            with report.waiting():
                time.sleep(0.05)
            time.sleep(0.05)
            report.worked(1e5)
            report.row(step, {"samples": step}, {"loss": 1.0})
    for row in read_metrics(tmp_path / "metrics.jsonl"):
        seconds = 1 / row["samples_per_second"]
        assert 0.05 / seconds <= row["data_wait"] + 1e-3 and row["data_wait"] < 1 - 0.04 / seconds
        assert row["mfu"] == pytest.approx(0.1 / seconds, rel=0.01)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_second_row_of_a_step_is_a_line_without_a_rate(tmp_path: Path, terminal: bool) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=100)
    with Reporter(tmp_path, LogConfig(), total_steps=10, console=console) as reporter:
        reporter.row(5, {"samples": 20}, {"loss": 1.5})
        reporter.row(5, {"samples": 20}, {"validation_text_loss": 2.5})
    assert "step 5/10  validation_text_loss 2.5\n" in screen.getvalue()
    assert read_metrics(tmp_path / "metrics.jsonl")[1] == {
        "step": 5,
        "samples": 20,
        "validation_text_loss": 2.5,
    }


@pytest.mark.slow
def test_wandb_offline_takes_rows_and_a_resumed_run_keeps_its_name(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    config = LogConfig(wandb_project="mmgen-test", wandb_mode="offline")
    report(tmp_path, terminal=False, config=config)
    name = (tmp_path / "wandb_run").read_text()
    report(tmp_path, terminal=False, step=1, config=config)
    assert (tmp_path / "wandb_run").read_text() == name
    # wandb's service writes the file in its own time, and is done some seconds after `finish` at the latest.
    deadline = time.monotonic() + 60
    steps: list[list[int]] = []
    while time.monotonic() < deadline and sorted(steps) != [[1, 2], [2, 3]]:
        time.sleep(0.2)
        files = tmp_path.glob(f"wandb/offline-run-*-{name}/run-{name}.wandb")
        # of each row, in the history and the summary: the key "step", and as field 16 its value in JSON
        found = [re.findall(rb"\x04step\x82\x01.(\d+)", file.read_bytes()) for file in files]
        steps = [sorted({int(number) for number in each}) for each in found]
    assert sorted(steps) == [[1, 2], [2, 3]], (
        "all rows of both, of which the second repeats what the first had begun"
    )
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        1,
        2,
        3,
    ]


def test_a_config_that_never_logs_is_refused() -> None:
    with pytest.raises(ValueError, match="every must be at least 1, is 0"):
        LogConfig(every=0)
