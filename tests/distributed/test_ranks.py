"""Several processes train one model: the same losses and weights as one process, whatever is shared how, and no hang
where one of them is lost. Every test starts real processes with torchrun."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmgen.config import save_yaml
from mmgen.data.compose import ComposeConfig
from mmgen.data.loader import DataConfig, build_loaders
from mmgen.data.pack import PackConfig
from mmgen.data.shards import write_shards
from mmgen.data.streams import SourceConfig
from mmgen.devices import find_device
from mmgen.model.joint import JointConfig
from mmgen.objectives import FlowMatchingConfig, IMMConfig
from mmgen.tokenization.text import train_text
from mmgen.training.checkpoint import latest_checkpoint, load_model_weights, read_state
from mmgen.training.cluster import Cluster
from mmgen.training.estimate import estimate
from mmgen.training.metrics import LogConfig
from mmgen.training.optim import OptimConfig
from mmgen.training.run import (
    CheckpointConfig,
    PreviewConfig,
    RunConfig,
    TrainConfig,
    ValidationConfig,
    build,
)
from mmgen.training.trainer import train
from tests.parts import TINY, WORDS, rows, sample

pytestmark = pytest.mark.slow

STREAMS = 8
STEPS = 20


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("ranks")
    write_shards(
        folder / "data", [sample(i) for i in range(80)], lambda _: "train", "test", max_samples_per_shard=10
    )
    train_text([" ".join(WORDS)] * 20, 300, folder / "tokenizer", max_size=8)
    source = SourceConfig(str(folder / "data"))
    tasks = ComposeConfig({"text image": 0.6, "image text": 0.2, "text": 0.2})
    return RunConfig(
        run="unset",
        tokenizer=str(folder / "tokenizer"),
        size=(16, 16),
        modalities={"text": {}, "image": {"codec": "pixels", "patch": 4}},
        model=TINY,
        objective=IMMConfig(k=3.0, k_final=5.0, gap=0.01, particles=2, anchors=0.2),
        data=DataConfig({"set": source}, tasks, PackConfig(1, 128, 128), STREAMS),
        optim=OptimConfig(lr=1e-3, warmup_steps=2),
        train=TrainConfig(steps=STEPS, precision="float64", micro_batches=2, workers=0),
        checkpoint=CheckpointConfig(every=STEPS),
        validation=ValidationConfig(every=10, sources={"set": source}, batches=3),
        log=LogConfig(every=1),
    )


TRAIN = ("mmgen", "train")


def torchrun(
    config: RunConfig, num_ranks: int, *words: str, program: tuple[str, ...] = TRAIN
) -> subprocess.Popen[str]:
    path = Path(f"{config.run}.yaml")
    save_yaml(config, path)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    return subprocess.Popen(
        [*launch, "-m", *program, str(path), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def run(config: RunConfig, num_ranks: int, *words: str, program: tuple[str, ...] = TRAIN) -> str:
    process = torchrun(config, num_ranks, *words, program=program)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def compare(one: Path, other: Path, tolerance: float, steps: int = STEPS) -> None:
    """Rows of metrics.jsonl but their rates, and every tensor of the last checkpoints."""
    expected, found = rows(one), rows(other)
    assert len(found) == len(expected) >= steps
    for row, like in zip(found, expected, strict=True):
        assert row.keys() == like.keys()
        assert row == pytest.approx(like, rel=tolerance, abs=tolerance)
    checkpoints = [latest_checkpoint(folder / "checkpoints") for folder in (one, other)]
    sections, others = ({path.name for path in each.iterdir() if path.is_dir()} for each in checkpoints)
    assert sections == others >= {"model", "ema", "optimizer"}
    for section in sections:
        stored, got = (load_model_weights(path, section) for path in checkpoints)
        assert stored.keys() == got.keys()
        for name, tensor in stored.items():
            torch.testing.assert_close(got[name], tensor, rtol=tolerance, atol=tolerance, msg=name)


# name -> ranks, tolerance, what differs from the configuration above
CASES: dict[str, tuple[int, float, dict]] = {
    "IMM, AdamW": (2, 1e-9, {}),
    "IMM, Muon, accumulation, checkpointing, a joint head": (
        2,
        1e-9,
        {
            "train": {"micro_batches": 4, "checkpointing": "full", "ema_also": (0.5,)},
            "optim": {"matrices": "muon"},
            "joint": JointConfig("chain", 3),
        },
    ),
    "accumulation and selective checkpointing": (
        2,
        1e-9,
        {"train": {"micro_batches": 6, "checkpointing": "selective"}},
    ),
    "two copies of two shards, checkpoints in the background": (
        4,
        1e-9,
        {"train": {"micro_batches": 8, "replicas": 2}, "checkpoint": {"background": True}},
    ),
    "three ranks, uneven shards, Muon": (
        3,
        1e-9,
        {"train": {"micro_batches": 3}, "data": {"streams": 9}, "optim": {"matrices": "muon"}},
    ),
    "float32, flow matching": (
        2,
        1e-5,
        {"train": {"precision": "float32"}, "objective": FlowMatchingConfig()},
    ),
    "float32, flow matching, accumulation, checkpointing": (
        2,
        1e-5,
        {
            "train": {"precision": "float32", "micro_batches": 4, "checkpointing": "full"},
            "objective": FlowMatchingConfig(),
        },
    ),
    "compiled blocks": (2, 1e-9, {"train": {"attention": "dense", "compile": True}}),
    "frozen text": (2, 1e-9, {"optim": {"rates": {"text_embedding": 0.0, "layers": 0.5}}}),
}


@pytest.mark.parametrize("name", CASES)
def test_ranks_train_what_one_process_trains(config: RunConfig, tmp_path: Path, name: str):
    num_ranks, tolerance, changes = CASES[name]
    for key, value in changes.items():
        part = replace(getattr(config, key), **value) if isinstance(value, dict) else value
        config = replace(config, **{key: part})
    alone = replace(config.train, replicas=1, compile=False)
    train(replace(config, run=str(tmp_path / "one"), train=alone))
    run(replace(config, run=str(tmp_path / "several")), num_ranks)
    compare(tmp_path / "one", tmp_path / "several", tolerance)


def test_a_step_sends_the_bytes_that_are_estimated(config: RunConfig, tmp_path: Path):
    """Two copies of two shards, two batches a rank: gradients are scattered after each, in float32, and summed over
    the copies after the last."""
    config = replace(
        config,
        run=str(tmp_path / "run"),
        optim=replace(config.optim, matrices="muon"),
        train=replace(config.train, steps=1, micro_batches=8, precision="bf16", replicas=2),
        validation=ValidationConfig(),
    )
    run(config, 4, program=("tests.distributed.traffic",))
    said = estimate(config, Cluster(find_device("h200"), 4, shards=2)).communication
    sent = [json.loads((tmp_path / f"run.{rank}.json").read_text()) for rank in range(4)]
    expected = {
        "all_gather": said.all_gather,
        "reduce_scatter": said.reduce_scatter,
        "all_reduce": said.all_reduce,
        "all_to_all": said.muon_gather,
    }
    for kind, num_bytes in expected.items():
        mean = sum(each[kind] for each in sent) / len(sent)
        assert mean == pytest.approx(num_bytes, abs=500), kind  # counts and losses are summed too


def test_in_bfloat16_ranks_end_where_one_process_does_but_for_rounding(config: RunConfig, tmp_path: Path):
    """Measured on a CPU: weights .0014 of the way that they went apart. Gradients summed in bfloat16 would hardly add
    to it (.0015), so the bytes that a step sends hold float32, above."""
    config = replace(
        config,
        train=replace(config.train, precision="bf16", micro_batches=4),
        validation=ValidationConfig(),
    )
    torch.manual_seed(config.seed)
    start = build(config).model.state_dict()
    train(replace(config, run=str(tmp_path / "one")))
    run(replace(config, run=str(tmp_path / "several")), 2)
    expected, found = rows(tmp_path / "one"), rows(tmp_path / "several")
    assert len(found) == STEPS
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], rel=1e-3)
    one, several = (
        load_model_weights(latest_checkpoint(tmp_path / each / "checkpoints"), "model")
        for each in ("one", "several")
    )
    assert distance(one, several) < 4e-3 * distance(one, start)


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Euclidean, over all weights."""
    return sum(float((tensor - other[name]).square().sum()) for name, tensor in one.items()) ** 0.5


def test_a_rank_without_pictures_neither_hangs_nor_biases_the_loss(config: RunConfig, tmp_path: Path):
    tasks = ComposeConfig({"text": 0.97, "text image": 0.03})
    config = replace(config, data=replace(config.data, compose=tasks))
    parts = build(config)
    loaders = [
        iter(each) for each in build_loaders(config.data, parts.modalities, 0, parts.objective.grouping)
    ]
    pictures = [int((next(loaders[n % STREAMS])[0].state.modality >= 0).sum()) for n in range(2 * STEPS)]
    by_step = list(zip(pictures[::2], pictures[1::2], strict=True))
    assert any(one and not other for one, other in by_step) and any(
        other and not one for one, other in by_step
    )
    assert any(not one and not other for one, other in by_step)
    train(replace(config, run=str(tmp_path / "one")))
    run(replace(config, run=str(tmp_path / "several")), 2)
    compare(tmp_path / "one", tmp_path / "several", 1e-9)


def test_a_run_goes_on_with_other_numbers_of_ranks(config: RunConfig, tmp_path: Path):
    """2 -> 1 -> 4 ranks: the weights of a run that was never cut, every sample drawn as often."""
    config = replace(config, train=replace(config.train, micro_batches=4))
    config = replace(
        config, checkpoint=CheckpointConfig(every=5, keep_last=10), validation=ValidationConfig()
    )
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(replace(config, run=str(whole)))
    # schedules are those of all steps: what later steps a leg made is taken away before the next
    run(replace(config, run=str(cut)), 2)
    keep(cut, 5)
    train(replace(config, run=str(cut)), resume=True)
    keep(cut, 10)
    run(replace(config, run=str(cut)), 4, "--resume")
    compare(whole, cut, 1e-9)
    states = [read_state(latest_checkpoint(each / "checkpoints"))["scalars"] for each in (whole, cut)]
    assert states[0] == states[1], "loaders stand elsewhere"


def keep(run: Path, step: int) -> None:
    for path in (run / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            for file in sorted(path.rglob("*"), reverse=True):
                file.unlink() if file.is_file() else file.rmdir()
            path.rmdir()
    assert int(latest_checkpoint(run / "checkpoints").name.removeprefix("step-")) == step


def endless(config: RunConfig, tmp_path: Path) -> RunConfig:
    return replace(
        config,
        run=str(tmp_path / "run"),
        train=replace(config.train, steps=100_000, precision="float32"),
        checkpoint=CheckpointConfig(every=10**6),
        validation=ValidationConfig(),
    )


def wait_for_rows(config: RunConfig, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while len(rows(Path(config.run))) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)


def test_where_a_rank_dies_the_others_stop_with_a_message(config: RunConfig, tmp_path: Path):
    config = endless(config, tmp_path)
    process = torchrun(config, 2)
    wait_for_rows(config, process)
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    os.kill(int(found.stdout.split()[-1]), signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert re.search(r"mmgen: error: rank \d of 2: another rank is gone or does not answer", output), output


def test_a_signal_to_all_ranks_saves_once_and_the_run_goes_on(config: RunConfig, tmp_path: Path):
    config = endless(config, tmp_path)
    process = torchrun(config, 2)
    wait_for_rows(config, process)
    process.send_signal(signal.SIGTERM)  # torchrun hands it on
    output, _ = process.communicate(timeout=60)
    assert output.count("stopped at step") == 1, output
    step = int(latest_checkpoint(tmp_path / "run" / "checkpoints").name.removeprefix("step-"))
    assert step == rows(tmp_path / "run")[-1]["step"]
    train(replace(config, train=replace(config.train, steps=step + 1)), resume=True)


def test_a_preview_is_drawn_from_shards(config: RunConfig, tmp_path: Path):
    config = replace(
        config,
        train=replace(config.train, steps=4, precision="bf16"),
        preview=PreviewConfig(every=4, prompts=("red square",), steps=(1, 2)),
    )
    for folder, num_ranks in (("one", 1), ("several", 2)):
        run(replace(config, run=str(tmp_path / folder)), num_ranks)
    pictures = [
        (tmp_path / each / "previews" / "step-00000004.png").read_bytes() for each in ("one", "several")
    ]
    assert len(pictures[0]) > 500


def test_ranks_that_cannot_share_are_told_so(config: RunConfig, tmp_path: Path):
    for changes, message in (
        ({"micro_batches": 3}, "train.micro_batches 3 must be a multiple of the 2 ranks"),
        ({"replicas": 3}, "train.replicas 3 does not divide the 2 ranks"),
    ):
        wrong = replace(config, run=str(tmp_path / "run"), train=replace(config.train, **changes))
        process = torchrun(wrong, 2)
        output, _ = process.communicate(timeout=120)
        assert process.returncode != 0 and f"mmgen: error: {message}" in output, output
        assert not (tmp_path / "run").exists()
