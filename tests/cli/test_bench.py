"""`mmgen bench`: what it times is what training and sampling do, and nothing is left behind."""

import json
from pathlib import Path

import pytest
import torch

from mmgen.cli.main import main
from mmgen.config import load_yaml
from mmgen.training import speed
from mmgen.training.run import RunConfig, build
from mmgen.training.step import Stepper


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def record(capsys: pytest.CaptureFixture[str], *argv: str) -> dict:
    assert main(["bench", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_steps_of_a_configuration_are_timed_and_nothing_is_written(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, before = str(run / "config.yaml"), files(run.parent)
    command = ["train", config, "--steps", "3", "--warmup", "1", "--run", str(run.parent / "other")]
    found = record(capsys, *command)
    assert len(found["steps"]) == len(found["waits"]) == 3
    assert all(0 < wait < step for wait, step in zip(found["waits"], found["steps"], strict=True))
    assert found["per_second"]["tokens"] == pytest.approx(found["seen"]["tokens"] / sum(found["steps"]))
    assert found["parts"].keys() == {"data", "forward", "backward", "optimizer", "other"}
    assert min(found["parts"].values()) > 0, "parts are within the steps that they are of"
    assert found["versions"].keys() >= {"python", "torch"}
    assert found["mfu"] is None and found["flops"] > 0 and found["memory_gb"] > 0
    assert files(run.parent) == before
    assert main(["bench", *command]) == 0
    printed = capsys.readouterr().out
    assert "pictures a second" in printed and "peak not known" in printed and "where a step goes" in printed


def test_overrides_change_what_is_timed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(run / "config.yaml")
    one = record(capsys, "train", config, "--steps", "1", "--warmup", "0", "--synthetic")
    more = ("--train.micro_batches", "2", "--train.precision=bf16", "--objective.name", "imm")
    two = record(capsys, "train", config, "--steps", "1", "--warmup", "0", "--synthetic", *more)
    assert two["seen"]["tokens"] == 2 * one["seen"]["tokens"] == 2 * (128 + 128)
    assert ", imm, bf16, " in two["what"] and ", flow_matching, float32, " in one["what"]
    # the target pass adds a forward of the noisy half to three of everything
    assert 2 * one["flops"] < two["flops"] < 2 * 4 / 3 * one["flops"]


def test_made_up_documents_need_no_data_tokenizer_or_autoencoder(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(run / "config.yaml")
    missing = ("--data.sources.set.path", str(tmp_path / "nowhere"))
    assert main(["bench", "train", config, *missing]) == 2
    error = capsys.readouterr().err
    assert "nowhere" in error and len(error.splitlines()) == 1
    (tmp_path / "recipe.yaml").write_text("vocab_size: 4096\n")
    yet_to_be_made = (*missing, "--tokenizer", str(tmp_path))
    found = record(capsys, "train", config, "--steps", "2", "--warmup", "0", "--synthetic", *yet_to_be_made)
    assert found["data_wait"] < 0.5 and found["seen"]["samples"] == found["seen"]["pictures"] == 2 * 8


def test_timed_steps_are_those_of_training(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights after them are the ones that so many steps of training leave."""
    config, made = load_yaml(run / "config.yaml", RunConfig), []

    class Kept(Stepper):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(speed, "Stepper", Kept)
    speed.measure_training(config, steps=1, warmup=0)  # and one in parts
    torch.manual_seed(config.seed)
    stepper = Stepper(config, build(config), made[0].ranks)
    ready = speed._real(stepper, speed.Part())
    for step in range(2):
        stepper.take(step, next(ready))
    expected, found = stepper.model.state_dict(), made[0].model.state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_a_step_that_training_would_leave_out_is_no_measurement(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--steps", "4", "--warmup", "0", "--optim.lr", "1e30", "--optim.warmup_steps", "0"]
    assert main(["bench", "train", str(run / "config.yaml"), *argv]) == 1
    error = capsys.readouterr().err
    assert "is not finite: what it takes says nothing" in error and len(error.splitlines()) == 1


def test_calls_of_a_run_are_timed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(run)
    command = ["sample", str(run), "--blocks", "1", "2", "--steps", "2", "--batch-sizes", "1", "3"]
    command += ["--repeats", "2", "--max-tokens", "5"]
    calls = record(capsys, *command)["calls"]
    pictures = [call for call in calls if call["task"] == "generate"]
    assert {(c["requests"], c["plan"]["blocks"], c["plan"]["guidance"]) for c in pictures} == {
        (num, blocks, guidance) for num in (1, 3) for blocks in (1, 2) for guidance in (1.0, 2.0)
    }
    for call in pictures:
        blocks, guided = call["plan"]["blocks"], call["plan"]["guidance"] != 1
        assert call["cost"]["nfe"] == 2 * blocks * (1 + guided)
        assert call["per_second"] == pytest.approx(call["requests"] / call["latency"])
    texts = [call for call in calls if call["task"] == "complete"]
    assert [call["requests"] for call in texts] == [1, 3]
    assert all(
        call["per_second"] == pytest.approx(call["cost"]["tokens"] / call["latency"]) for call in texts
    )
    assert main(["bench", *command]) == 0
    assert "pictures" in capsys.readouterr().out and files(run) == before


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "the first word after `mmgen bench` is train or sample, not trian"),
        (["train", "--steps", "3"], "the first word after `mmgen bench train` is the YAML file, not --steps"),
        (["train", "nothing.yaml"], "nothing.yaml: cannot be read"),
        (["train", "configs/smoke.yaml", "--steps", "0"], "steps 0 must be at least 1"),
        (["train", "configs/smoke.yaml", "--optim.lrr", "1"], "--optim.lrr: unknown key"),
        (["train", "configs/smoke.yaml", "--train.workers", "2"], "data.streams 1 must be a multiple of 2"),
        (["train", "configs/smoke.yaml", "--synthetic", "--size", "256", "256"], "has no room for one"),
        (["sample", "nowhere"], "nowhere holds no checkpoint"),
        (["sample", "models/emoji", "--batch-sizes", "0"], "batch_sizes (0,) must be numbers of at least 1"),
        (["sample", "models/emoji", "--blocks", "5"], "blocks 5: a picture of 4 rows"),
        (["sample", "models/emoji", "--repeats", "0"], "repeats 0 must be at least 1"),
    ],
)
def test_mistakes_are_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
