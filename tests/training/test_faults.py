"""What goes wrong with a run of days, brought about: no half-written folder, nothing lost, one line that says what."""

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmgen.config import save_yaml
from mmgen.data.compose import ComposeConfig
from mmgen.data.loader import DataConfig
from mmgen.data.pack import PackConfig
from mmgen.data.shards import write_shards
from mmgen.data.streams import SourceConfig
from mmgen.modalities import Image
from mmgen.tokenization.text import train_text
from mmgen.training.checkpoint import latest_checkpoint, load_model_weights, read_state
from mmgen.training.metrics import LogConfig, read_metrics
from mmgen.training.optim import OptimConfig
from mmgen.training.run import CheckpointConfig, PreviewConfig, RunConfig, TrainConfig, ValidationConfig
from mmgen.training.trainer import train
from tests.parts import TINY, WORDS, rows, sample, weights


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("faults")
    write_shards(
        folder / "data", [sample(i) for i in range(30)], lambda _: "train", "test", max_samples_per_shard=10
    )
    train_text([" ".join(WORDS)] * 20, 300, folder / "tokenizer", max_size=8)
    source = SourceConfig(str(folder / "data"))
    return RunConfig(
        run="unset",
        tokenizer=str(folder / "tokenizer"),
        size=(16, 16),
        modalities={"text": {}, "image": {"codec": "pixels", "patch": 4}},
        model=TINY,
        data=DataConfig({"set": source}, ComposeConfig({"text image": 1.0}), PackConfig(2, 128, 128)),
        optim=OptimConfig(warmup_steps=2),
        train=TrainConfig(steps=10, precision="float32", workers=0),
        checkpoint=CheckpointConfig(every=1),
        validation=ValidationConfig(sources={"set": source}, batches=1),
        log=LogConfig(every=1),
    )


def start(config: RunConfig, path: Path, *words: str) -> subprocess.Popen[str]:
    save_yaml(config, path)
    return subprocess.Popen(
        [sys.executable, "-m", "mmgen", "train", str(path), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def wait_until(done, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not done():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def test_checkpoints_written_beside_the_steps_are_those_written_within_them(
    config: RunConfig, tmp_path: Path
):
    for background in (False, True):
        checkpoint = CheckpointConfig(every=3, keep_last=9, background=background)
        train(replace(config, run=str(tmp_path / str(background)), checkpoint=checkpoint))
    names = [
        sorted(p.name for p in (tmp_path / each / "checkpoints").iterdir()) for each in ("False", "True")
    ]
    assert names[0] == names[1] == [f"step-{step:08d}" for step in (3, 6, 9, 10)]
    for name in names[0]:
        for section in ("model", "ema", "optimizer"):
            within, beside = (
                load_model_weights(tmp_path / each / "checkpoints" / name, section)
                for each in ("False", "True")
            )
            assert all(torch.equal(beside[key], tensor) for key, tensor in within.items())


@pytest.mark.slow
@pytest.mark.parametrize(("background", "workers"), [(False, 0), (True, 2)])
def test_kills_at_any_moment_of_writing_lose_no_more_than_the_steps_since(
    config: RunConfig, tmp_path: Path, background: bool, workers: int
):
    """Killed again and again while every step writes a checkpoint, the run ends as one that nobody touched."""
    config = replace(
        config,
        checkpoint=CheckpointConfig(every=1, background=background),
        data=replace(config.data, streams=2),
        train=replace(config.train, steps=60, workers=workers),
    )
    train(replace(config, run=str(tmp_path / "whole")))
    cut = replace(config, run=str(tmp_path / "cut"))
    folder, draw, kills = tmp_path / "cut" / "checkpoints", random.Random(0), 0
    for _ in range(4):
        latest = latest_checkpoint(folder)
        process = start(cut, tmp_path / "cut.yaml", *(["--resume"] if latest else []))
        begun = 0 if latest is None else read_state(latest)["step"]

        def written(begun: int = begun) -> bool:
            found = latest_checkpoint(folder)
            return found is not None and int(found.name.removeprefix("step-")) > begun + 2

        wait_until(written, process)
        time.sleep(draw.random() * 0.1)
        process.kill()
        process.wait()
        found = latest_checkpoint(folder)
        assert found is not None
        if read_state(found)["step"] < 60:
            kills += 1
    assert kills >= 3
    train(cut, resume=True)
    expected, got = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_stops_the_run_with_one_line_and_keeps_what_was_there(
    config: RunConfig, tmp_path: Path, background: bool
):
    run = tmp_path / "run"
    run.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(run)], check=False)
    if mounted.returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        checkpoint = CheckpointConfig(every=1, keep_last=100, background=background)
        full = replace(config, run=str(run), checkpoint=checkpoint, train=replace(config.train, steps=100))
        process = start(full, tmp_path / "run.yaml")
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 1 and "Traceback" not in output
        assert "mmgen: error: checkpoint" in output and "could not be written" in output
        latest = latest_checkpoint(run / "checkpoints")
        assert latest is not None
        load_model_weights(latest)
        assert not list((run / "checkpoints").glob(".*")), "something half-written was left"
    finally:
        subprocess.run(["umount", str(run)], check=True)


@pytest.mark.slow
def test_a_worker_that_the_system_ends_stops_the_run_with_one_line(config: RunConfig, tmp_path: Path):
    endless = replace(config.train, steps=10**6, workers=1)
    process = start(replace(config, run=str(tmp_path / "run"), train=endless), tmp_path / "run.yaml")
    wait_until(lambda: latest_checkpoint(tmp_path / "run" / "checkpoints") is not None, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert children and process.returncode == 1, output
    assert "error: a process that makes batches was ended by the system" in output.splitlines()[-1]
    assert "Traceback" not in output


@pytest.mark.slow
def test_an_error_that_nobody_expects_ends_the_process_and_its_workers(config: RunConfig, tmp_path: Path):
    """Such as a GPU without memory: the traceback holds on to everything until the process is gone."""
    save_yaml(
        replace(config, run=str(tmp_path / "run"), train=replace(config.train, workers=1)),
        tmp_path / "run.yaml",
    )
    program = """
import sys
from mmgen.cli.main import main
from mmgen.training.step import Stepper

def take(*_):
    raise RuntimeError("out of memory")

Stepper.take = take
main(["train", sys.argv[1]])
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "run.yaml")],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == "RuntimeError: out of memory"


@pytest.mark.slow
@pytest.mark.parametrize("what", ["validation", "quality", "preview"])
def test_a_signal_in_the_middle_of_an_evaluation_saves_and_stops(
    config: RunConfig, tmp_path: Path, what: str
):
    """The evaluation would take an hour: it is left where it is."""
    run = tmp_path / "run"
    endless = {
        "validation": {"validation": replace(config.validation, every=2, batches=10**6)},
        "quality": {
            "validation": replace(config.validation, every=2, batches=1, pictures=8, steps=(1000,) * 200)
        },
        "preview": {"preview": PreviewConfig(2, ("red square",), (1000,) * 200)},
    }[what]
    process = start(
        replace(config, run=str(run), checkpoint=CheckpointConfig(), **endless), tmp_path / "run.yaml"
    )
    wait_until(
        lambda: (run / "metrics.jsonl").is_file() and len(read_metrics(run / "metrics.jsonl")) == 2, process
    )
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopped at step 2 of 10" in output, output
    latest = latest_checkpoint(run / "checkpoints")
    assert latest is not None and latest.name == "step-00000002"


def test_a_loss_that_is_not_finite_leaves_its_batch_and_in_the_end_stops_the_run(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Pictures of some steps turn into nan on their way: two may, the third stops the run."""
    plain, calls = Image.patchify, []

    def poisoned(self: Image, latents):
        calls.append(1)
        values, height, width = plain(self, latents)
        return (values * float("nan") if len(calls) % 40 == 0 else values), height, width

    monkeypatch.setattr(Image, "patchify", poisoned)
    run = tmp_path / "run"
    broken = replace(config, run=str(run), train=replace(config.train, steps=100, skip_budget=2))
    with pytest.raises(FloatingPointError, match=r"3 steps failed so, 2 may. Its batch is .*faults"):
        train(broken)
    files = sorted((run / "faults").glob("*.safetensors"))
    assert len(files) == 3
    batch = load_file(files[0])
    assert batch["0.batch.state.values.image"].isnan().any() and "0.batch.context.ids" in batch
    assert files[0].with_suffix(".json").is_file()
    latest = latest_checkpoint(run / "checkpoints")
    assert latest is not None and read_state(latest)["finite"]
    assert all(tensor.isfinite().all() for tensor in load_model_weights(latest).values())
