"""A run can be cut anywhere and goes on as if it had not been; what is wrong is said before anything is lost."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from mmgen.config import save_yaml
from mmgen.data.compose import ComposeConfig
from mmgen.data.loader import DataConfig, Loader
from mmgen.data.pack import PackConfig
from mmgen.data.shards import write_shards
from mmgen.data.source import SourceConfig
from mmgen.model.joint import JointConfig
from mmgen.objectives import FlowMatchingConfig, IMMConfig, ObjectiveConfig
from mmgen.sampling.plan import Plan
from mmgen.sequence import NO_LABEL
from mmgen.tokenization.text import train_text
from mmgen.training.checkpoint import latest_checkpoint, load_model_weights, read_state
from mmgen.training.feed import draw_windows
from mmgen.training.metrics import LogConfig, read_metrics
from mmgen.training.optim import OptimConfig
from mmgen.training.run import (
    CheckpointConfig,
    PreviewConfig,
    RunConfig,
    TrainConfig,
    ValidationConfig,
    build,
    load,
)
from mmgen.training.trainer import emulated, near_passes, train
from tests.parts import TINY, WORDS, rows, sample, weights


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("run")
    write_shards(
        folder / "data", [sample(i) for i in range(30)], lambda _: "train", "test", max_samples_per_shard=10
    )
    train_text([" ".join(WORDS)] * 20, 300, folder / "tokenizer", max_size=8)
    source = SourceConfig(str(folder / "data"))
    tasks = ComposeConfig({"text image": 0.6, "image text": 0.2, "text": 0.2})
    return RunConfig(
        run=str(folder / "unset"),
        tokenizer=str(folder / "tokenizer"),
        size=(16, 16),
        modalities={"text": {}, "image": {"codec": "pixels", "patch": 4}},
        model=TINY,
        data=DataConfig({"set": source}, tasks, PackConfig(2, 128, 128)),
        optim=OptimConfig(warmup_steps=2),
        train=TrainConfig(steps=10, precision="float32"),
        checkpoint=CheckpointConfig(every=5, keep_last=3),
        validation=ValidationConfig(every=5, sources={"set": source}, batches=1),
        preview=PreviewConfig(every=10, prompts=("red square",), steps=(1, 2)),
        log=LogConfig(every=1),
    )


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("precision", "matrices", "joint"),
    [("float32", "adamw", None), ("bf16", "muon", JointConfig("hmm", 3, 4))],
)
def test_ten_steps_equal_five_and_five_bit_for_bit(
    config: RunConfig,
    tmp_path: Path,
    workers: int,
    precision: str,
    matrices: Literal["adamw", "muon"],
    joint: JointConfig | None,
):
    """Of two sources mixed, packed in two streams that take turns: the cut is in the middle of a turn."""
    write_shards(
        tmp_path / "other",
        [sample(i) for i in range(30, 60)],
        lambda _: "train",
        "test",
        max_samples_per_shard=10,
    )
    sources = {**config.data.sources, "other": SourceConfig(str(tmp_path / "other"), weight=0.5)}
    base = replace(
        config,
        joint=joint,
        data=replace(config.data, sources=sources, streams=2),
        optim=replace(config.optim, matrices=matrices),
        train=replace(config.train, precision=precision, workers=workers),
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(replace(base, run=str(whole)))
    # the schedule must be that of ten steps, so the first half is cut, not planned: a copy of the run at step 5
    train(replace(base, run=str(parts)))
    for path in (parts / "checkpoints").glob("step-00000010*"):
        for file in sorted(path.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        path.rmdir()
    latest = latest_checkpoint(parts / "checkpoints")
    assert latest.name == "step-00000005"
    loaders = read_state(latest)["scalars"]["loaders"]
    positions = [position for loader in loaders for position in loader["positions"].values()]
    assert len(positions) == 4 and all(each["epoch"] or each["index"] for each in positions), "all are read"
    train(replace(base, run=str(parts)), resume=True)
    expected, found = weights(whole), weights(parts)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert rows(parts) == rows(whole)


def test_a_joint_head_learns_beside_the_trunk_and_writes_several_tokens_a_pass(
    config: RunConfig, tmp_path: Path
):
    """The captions are words of a small set: the head's loss falls, on held-out windows too, and drafts are kept."""
    run = tmp_path / "run"
    optim = OptimConfig(lr=1e-2, warmup_steps=2)
    tasks = replace(config.data, compose=ComposeConfig({"text": 1.0}))
    joint = JointConfig("chain", 3, weight=0.3, share=0.5)
    config = replace(config, run=str(run), joint=joint, optim=optim, data=tasks)
    config = replace(config, train=replace(config.train, steps=60, ema_decay=0.9), preview=PreviewConfig())
    train(config)
    found = rows(run)
    first, last = found[0], next(row for row in reversed(found) if "joint_loss" in row)
    assert last["joint_loss"] < 0.7 * first["joint_loss"]
    held_out = [row["validation_joint_loss"] for row in found if "validation_joint_loss" in row]
    assert held_out[-1] < held_out[0]
    sampler = load(run)
    plan = Plan(max_tokens=24, tokens_per_pass=3, temperature=0.3)
    cost = sampler.complete(["a red"] * 8, plan).cost
    assert cost.tokens / cost.passes > 1.2, "drafts are kept"
    cost = sampler.complete(["a red"] * 8, replace(plan, tokens_per_pass=1)).cost
    assert cost.tokens / cost.passes < 1.2


def test_a_model_of_text_alone_trains_and_writes(config: RunConfig, tmp_path: Path):
    tasks = replace(config.data, compose=ComposeConfig({"text": 1.0}))
    train(
        replace(
            config, run=str(tmp_path / "run"), modalities={"text": {}}, data=tasks, preview=PreviewConfig()
        )
    )
    found = rows(tmp_path / "run")
    assert "image_loss" not in found[0] and found[-2]["text_loss"] < found[0]["text_loss"]
    sampler = load(tmp_path / "run")
    assert len(sampler.complete(["red"], Plan(max_tokens=4)).text) == 1
    with pytest.raises(ValueError, match="this model has no pictures"):
        sampler.generate(["red"])


@pytest.mark.slow
def test_a_compiled_run_trains_alike_and_previews(config: RunConfig, tmp_path: Path):
    losses = []
    for compiled in (False, True):
        settings = replace(config.train, attention="dense", compile=compiled)
        run = tmp_path / f"compiled-{compiled}"
        train(replace(config, run=str(run), train=settings))
        losses.append([row["loss"] for row in rows(run) if "loss" in row])
        assert (run / "previews" / "step-00000010.png").is_file()
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_what_has_other_shapes_in_every_batch_is_not_compiled(config: RunConfig, tmp_path: Path):
    with pytest.raises(ValueError, match=r"train.compile needs train.attention dense or flex: runs"):
        train(replace(config, run=str(tmp_path), train=replace(config.train, attention="runs", compile=True)))


def test_the_first_words_say_what_computes_attention_and_why(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture
):
    for asked, said in (
        ("auto", "runs attention (auto: a CPU computes"),
        ("dense", "dense attention (as asked)"),
    ):
        settings = replace(config.train, steps=1, attention=asked)
        train(replace(config, run=str(tmp_path / asked), train=settings))
        assert said in " ".join(capsys.readouterr().out.split())
    with pytest.raises(ValueError, match="train.attention flex needs a CUDA device to train on, not cpu"):
        train(replace(config, run=str(tmp_path / "flex"), train=replace(config.train, attention="flex")))


@pytest.mark.parametrize(
    ("objective", "precision", "warned"),
    [
        (IMMConfig(), "bf16", True),
        (IMMConfig(gap=0.003), "bf16", False),
        (IMMConfig(), "float32", False),
        (FlowMatchingConfig(), "bf16", False),
    ],
)
def test_passes_that_bfloat16_cannot_tell_apart_are_warned_of(
    config: RunConfig, objective: ObjectiveConfig, precision: Literal["bf16", "float32"], warned: bool
):
    train = replace(config.train, precision=precision)
    said = near_passes(replace(config, objective=objective, train=train))
    assert (said is not None and "objective.gap 0 in bf16" in said) == warned


@pytest.mark.parametrize(
    ("able", "precision", "device", "warned"),
    [
        ({"architecture": "x86_64", "avx2": True}, "bf16", "cpu", True),
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False}, "bf16", "cpu", True),
        ({"architecture": "x86_64", "avx512_bf16": True}, "bf16", "cpu", False),
        ({"architecture": "x86_64", "amx_bf16": True}, "bf16", "cpu", False),
        ({"architecture": "aarch64"}, "bf16", "cpu", False),
        ({"architecture": "x86_64"}, "float32", "cpu", False),
        ({"architecture": "x86_64"}, "bf16", "cuda", False),
    ],
)
def test_a_processor_without_bfloat16_is_told(
    config: RunConfig,
    able: dict[str, Any],
    precision: Literal["bf16", "float32"],
    device: str,
    warned: bool,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    said = emulated(replace(config, train=replace(config.train, precision=precision)), torch.device(device))
    assert (said is not None and "train.precision bf16" in said) == warned


def test_a_run_says_its_warnings_first(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64"}, raising=False)
    brief = replace(config.train, precision="bf16", steps=1, workers=0)
    train(replace(config, run=str(tmp_path / "run"), train=brief, objective=IMMConfig()))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("warning: objective.gap 0 in bf16")
    assert lines[2].startswith("warning: train.precision bf16 on a processor without")


def test_windows_are_drawn_by_seed_and_step_among_the_tokens_with_a_label(config: RunConfig):
    parts = build(config)
    batch, _ = next(iter(Loader(config.data, parts.modalities, 0)))
    asked = batch.labels != NO_LABEL
    found = [draw_windows(batch, 0.5, *key) for key in ((0, 1), (0, 1), (0, 2), (1, 1))]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2]) and not torch.equal(found[0], found[3])
    assert all((each & asked).equal(each) for each in found)
    assert 0.35 < sum(int(each.sum()) for each in found) / (4 * int(asked.sum())) < 0.65
    assert draw_windows(batch, 1.0, 0, 1).equal(asked)


def test_another_seed_is_another_run(config: RunConfig, tmp_path: Path):
    for seed in (0, 1):
        train(replace(config, run=str(tmp_path / str(seed)), seed=seed, train=replace(config.train, steps=2)))
    assert rows(tmp_path / "0")[0]["loss"] != rows(tmp_path / "1")[0]["loss"]


def test_a_run_writes_what_people_look_at(config: RunConfig, tmp_path: Path):
    held_out = replace(config.validation, batches=4, every=20, pictures=6, steps=(1, 2))
    longer = replace(config.train, steps=40)
    train(replace(config, run=str(tmp_path / "run"), train=longer, validation=held_out))
    table = rows(tmp_path / "run")
    for row in (row for row in table if "validation_image_loss" in row):
        by_time = {key for key in row if key.startswith("validation_image_loss_t")}
        assert (
            by_time <= {f"validation_image_loss_t{time:g}" for time in (0, 0.2, 0.4, 0.6, 0.8)}
            and len(by_time) > 2
        )
        assert (
            min(row[key] for key in by_time) < row["validation_image_loss"] < max(row[key] for key in by_time)
        )
        assert {"validation_kid_1_step", "validation_kid_2_steps"} <= row.keys()
        # a token of the tests' tokenizer is a byte at least, and some have none
        assert 0.2 < row["validation_bits_per_byte"] * math.log(2) / row["validation_text_loss"] < 3
    first = table[0]
    assert {"step", "samples", "loss", "text_loss", "image_loss", "grad_norm", "lr"} <= first.keys()
    assert any("validation_text_loss" in row and "validation_image_loss" in row for row in table)
    losses = [row["text_loss"] for row in table if "text_loss" in row]
    assert losses[-1] < losses[0] - 0.5, "it learns"
    assert (tmp_path / "run" / "previews" / "step-00000040.png").is_file()
    assert (tmp_path / "run" / "config.yaml").is_file()
    result = load(tmp_path / "run").generate(["red square"])
    assert result.images[0].size == (16, 16)


def test_a_window_of_steps_is_profiled(config: RunConfig, tmp_path: Path):
    run = tmp_path / "run"
    short = replace(config, run=str(run), preview=PreviewConfig(), validation=ValidationConfig())
    train(replace(short, log=LogConfig(profile=(2, 3)), train=replace(config.train, steps=5)))
    (path,) = (run / "profile").iterdir()
    assert path.name == "steps-2-3-rank-0.json"
    events = json.loads(path.read_text())["traceEvents"]
    steps = {event["name"] for event in events if str(event.get("name", "")).startswith("ProfilerStep")}
    assert len(steps) == 2 and any(event.get("name") == "aten::mm" for event in events)
    assert {"forward", "backward", "optimizer"} <= {event.get("name") for event in events}
    with pytest.raises(ValueError, match="past step 2 already"):
        again = replace(short, log=LogConfig(profile=(2, 3)), train=replace(config.train, steps=6))
        train(again, resume=True)
    with pytest.raises(ValueError, match=r"profile \[3, 2\] must be two steps"):
        LogConfig(profile=(3, 2))


def test_more_pictures_than_there_are_held_out_is_said_before_training(config: RunConfig, tmp_path: Path):
    held_out = replace(config.validation, pictures=1000)
    with pytest.raises(ValueError, match=r"validation.pictures 1000: the sources of validation have 30"):
        train(replace(config, run=str(tmp_path / "run"), validation=held_out))
    assert not (tmp_path / "run").exists()


def test_an_existing_run_is_not_overwritten(config: RunConfig, tmp_path: Path):
    short = replace(config, run=str(tmp_path / "run"), train=replace(config.train, steps=1))
    train(short)
    with pytest.raises(ValueError, match="already holds a run.*--resume"):
        train(short)


def test_training_begins_from_another_runs_averaged_weights(config: RunConfig, tmp_path: Path):
    once = replace(config, run=str(tmp_path / "a"), train=replace(config.train, steps=4))
    train(once)
    begun = replace(config.train, steps=1, begin_from=str(tmp_path / "a"))
    still = replace(
        config, run=str(tmp_path / "b"), train=begun, optim=replace(config.optim, lr=1e-12), seed=7
    )
    train(still)
    expected, found = weights(tmp_path / "a"), weights(tmp_path / "b")
    for name, tensor in expected.items():
        if name.startswith("ema."):
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-9)
    wider = replace(
        still, run=str(tmp_path / "c"), model=replace(config.model, ffn_width=2 * config.model.ffn_width)
    )
    with pytest.raises(ValueError, match="does not fit this model"):
        train(wider)
    with pytest.raises(ValueError, match="holds no checkpoint"):
        train(replace(wider, train=replace(begun, begin_from=str(tmp_path / "nowhere"))))
    assert not (tmp_path / "c").exists(), "nothing was begun"


def test_a_text_model_learns_pictures(config: RunConfig, tmp_path: Path):
    """From a run of text alone: what it lacks begins anew, the rest is taken; what is frozen stays as it was."""
    text = replace(
        config,
        run=str(tmp_path / "text"),
        modalities={"text": {}},
        data=replace(config.data, compose=ComposeConfig({"text": 1.0})),
        train=replace(config.train, steps=3),
        preview=PreviewConfig(),
    )
    train(text)
    both = replace(
        config,
        run=str(tmp_path / "both"),
        train=replace(config.train, steps=2, begin_from=str(tmp_path / "text")),
        optim=replace(config.optim, rates={"text_embedding|mlp": 0.0, "embeddings|heads": 2.0}),
        seed=5,
    )
    train(both)
    before, after = weights(tmp_path / "text"), weights(tmp_path / "both")
    for name in ("text_embedding.weight", "trunk.layers.1.mlp.up_proj.weight"):
        assert torch.equal(after[f"model.{name}"], before[f"ema.{name}"])
    moved = "model.trunk.layers.1.self_attn.q_proj.weight"
    difference = (after[moved] - before[moved.replace("model.", "ema.")]).abs().max()
    assert 0 < difference < 4 * config.optim.lr
    assert not any("mlp" in name for name in after if name.startswith("optimizer."))
    backwards = replace(
        text, run=str(tmp_path / "c"), train=replace(text.train, begin_from=str(tmp_path / "both"))
    )
    with pytest.raises(ValueError, match="unexpected .*image"):
        train(backwards)


def test_averages_of_several_decays_are_kept_and_drawn_with(config: RunConfig, tmp_path: Path):
    run = tmp_path / "run"
    train(replace(config, run=str(run), train=replace(config.train, steps=6, ema_also=(0.2, 0.9999))))
    checkpoint = latest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    quick, usual, slow, plain = (
        load_model_weights(checkpoint, section)["text_embedding.weight"]
        for section in ("ema-0.2", "ema", "ema-0.9999", "model")
    )
    assert (quick - plain).abs().max() < (usual - plain).abs().max() <= (slow - plain).abs().max()
    assert load(run, "ema-0.2").generate(["red square"]).images[0].size == (16, 16)


def test_a_rate_for_no_parameter_is_refused(config: RunConfig, tmp_path: Path):
    optim = replace(config.optim, rates={"lyers": 0.5})
    with pytest.raises(ValueError, match="no parameter's name has a match of 'lyers'"):
        train(replace(config, run=str(tmp_path / "run"), optim=optim))
    assert not (tmp_path / "run").exists()


def test_resuming_another_run_is_refused_by_name_of_the_setting(config: RunConfig, tmp_path: Path):
    short = replace(config, run=str(tmp_path / "run"), train=replace(config.train, steps=1))
    with pytest.raises(ValueError, match="no checkpoint"):
        train(short, resume=True)
    train(short)
    with pytest.raises(ValueError, match=r"optim\.lr"):
        train(replace(short, optim=replace(short.optim, lr=0.5)), resume=True)
    train(replace(short, train=replace(short.train, steps=2)), resume=True)
    ((name, source),) = short.data.sources.items()
    shutil.copytree(str(source.path), tmp_path / "moved")
    moved = replace(source, path=str(tmp_path / "moved"), max_broken=0.5, cache_mb=1)
    elsewhere = replace(short.data, sources={name: moved})
    train(replace(short, data=elsewhere, train=replace(short.train, steps=3)), resume=True)
    with pytest.raises(ValueError, match=rf"data\.sources\.{name}\.window"):
        train(replace(short, data=replace(elsewhere, sources={name: replace(moved, window=7)})), resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_goes_on_from_there(
    config: RunConfig, tmp_path: Path, number: signal.Signals
):
    endless = replace(
        config,
        run=str(tmp_path / "run"),
        train=replace(config.train, steps=100_000),
        preview=PreviewConfig(),
        checkpoint=CheckpointConfig(every=10**6),
    )
    save_yaml(endless, tmp_path / "run.yaml")
    process = subprocess.Popen(
        [sys.executable, "-m", "mmgen", "train", str(tmp_path / "run.yaml")],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and len(read_metrics(metrics)) > 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    os.killpg(process.pid, number)  # as a terminal and most schedulers do: the worker gets it too
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "stopped at step" in output
    step = int(latest_checkpoint(tmp_path / "run" / "checkpoints").name.removeprefix("step-"))
    assert step == read_metrics(metrics)[-1]["step"] > 3
    train(replace(endless, train=replace(endless.train, steps=step + 1)), resume=True)
    assert read_metrics(metrics)[-1]["step"] == step + 1
