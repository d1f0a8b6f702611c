"""The checkpoint format: bit-exact, whole or absent, strict about what it is loaded into, and free of pickle."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

from mmgen.training import checkpoint
from mmgen.training.checkpoint import (
    MARKER,
    latest_checkpoint,
    load_checkpoint,
    load_model_weights,
    optimizer_state,
    prune,
    read_state,
    save_checkpoint,
)
from mmgen.training.optim import OptimConfig, build_optimizer


def some_tensors() -> dict[str, Tensor]:
    x = torch.randn(4, 6)
    return {
        "float": x,
        "bf16": torch.randn(3, 2).bfloat16(),
        "double": torch.randn(5, dtype=torch.float64),
        "int64": torch.tensor([2**62 + 1, -3]),
        "bool": torch.tensor([True, False]),
        "step": torch.tensor(7.0),
        "count": torch.tensor(2**61 + 1),
        "empty": torch.zeros(0, 3),
        "transposed": torch.randn(3, 2).t(),
        "tied": x,
        "column": torch.randn(4, 4)[:, 1],
    }


def test_round_trip_is_bit_exact_for_every_type_and_shape(tmp_path: Path) -> None:
    saved = {"model": some_tensors(), "optimizer": {"state": {"a.weight": {"step": torch.tensor(3.0)}}}}
    scalars = {"samples": 2**60 + 1, "rate": 0.1 + 0.2, "loader": {"streams": [{"epoch": 1, "name": "é"}]}}
    path = save_checkpoint(tmp_path, 12, saved, scalars)
    assert path == tmp_path / "step-00000012" and [p.name for p in tmp_path.iterdir()] == [path.name]

    loaded = {
        "model": {name: torch.full_like(t, 1) for name, t in saved["model"].items()},
        "optimizer": {"state": {"a.weight": {"step": torch.tensor(0.0)}}},
    }
    assert load_checkpoint(path, loaded) == scalars
    for name, tensor in saved["model"].items():
        assert loaded["model"][name].dtype == tensor.dtype and torch.equal(loaded["model"][name], tensor), (
            name
        )
    assert loaded["optimizer"]["state"]["a.weight"]["step"] == 3

    weights = load_model_weights(path, "model")
    assert weights.keys() == saved["model"].keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in saved["model"].items())


def test_loading_restores_model_and_optimizer_so_that_training_continues_bit_for_bit(tmp_path: Path) -> None:
    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8), nn.LayerNorm(8))
        return model, build_optimizer(model, OptimConfig())

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            x = torch.randint(10, (16,), generator=torch.Generator().manual_seed(step))
            model(x).square().sum().sin().backward()
            optimizer.step()
            optimizer.zero_grad()

    def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
        return {"model": model.state_dict(), "optimizer": optimizer_state(model, optimizer)}

    model, optimizer = fresh()
    train(model, optimizer, range(5))
    path = save_checkpoint(tmp_path, 5, state(model, optimizer), {})
    train(model, optimizer, range(5, 10))

    resumed, resumed_optimizer = fresh()
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
    load_checkpoint(path, state(resumed, resumed_optimizer))
    train(resumed, resumed_optimizer, range(5, 10))
    for name, tensor in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    for name, tensor in optimizer_state(model, optimizer).items():
        assert torch.equal(optimizer_state(resumed, resumed_optimizer)[name], tensor), name


def test_what_differs_is_said_in_one_line_and_nothing_is_changed(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, {"model": {"a": torch.ones(2, 3), "b": torch.ones(4)}}, {})

    def refused(tensors: dict) -> str:
        with pytest.raises(ValueError) as caught:
            load_checkpoint(path, tensors)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    good = torch.zeros(4)
    text = refused({"model": {"a": torch.zeros(3, 2), "b": good, "c": torch.zeros(1)}})
    assert "1 missing (c [1])" in text and "a [2, 3] float32 stored, [3, 2] float32 expected" in text
    assert not good.any(), "a refused checkpoint was partly loaded"
    assert "1 unexpected (b [4])" in refused({"model": {"a": torch.zeros(2, 3)}})
    assert "float32 stored, [4] bfloat16 expected" in refused(
        {"model": {"a": torch.zeros(2, 3), "b": good.bfloat16()}}
    )
    assert "has no section 'ema'; it has model" in refused({"ema": {}})


def test_truncated_missing_and_foreign_files_are_refused(tmp_path: Path) -> None:
    def saved(step: int) -> tuple[Path, Path]:
        path = save_checkpoint(tmp_path, step, {"model": {"a": torch.ones(100)}}, {})
        return path, next((path / "model").glob("*.safetensors"))

    path, file = saved(1)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(
        ValueError, match=r"has \d+ bytes where \d+ bytes were written; the checkpoint is damaged"
    ):
        load_checkpoint(path, {"model": {"a": torch.zeros(100)}})
    path, file = saved(2)
    file.unlink()
    with pytest.raises(ValueError, match="is missing where"):
        load_model_weights(path, "model")
    path, file = saved(3)
    file.write_bytes(b"\0" * file.stat().st_size)
    with pytest.raises(ValueError, match="damaged safetensors file"):
        load_model_weights(path, "model")
    path, _ = saved(4)
    (path / "state.json").write_text(json.dumps({"format": 9}).ljust((path / "state.json").stat().st_size))
    with pytest.raises(ValueError, match="format 9; this version reads format 1"):
        read_state(path)
    with pytest.raises(ValueError, match=f"not a finished mmgen checkpoint.*{path.name}"):
        read_state(tmp_path)
    with pytest.raises(ValueError, match="must be JSON"):
        save_checkpoint(tmp_path, 5, {}, {"x": torch.ones(1)})


@pytest.mark.parametrize("moment", ["write_text", "_move_into_place"])
def test_a_kill_before_the_rename_leaves_the_old_checkpoint_the_latest(tmp_path: Path, moment: str) -> None:
    """The writer kills itself, uncatchably, with all tensors on disk: before the marker, and just before the rename."""
    save_checkpoint(tmp_path, 1, {"model": {"a": torch.ones(3)}}, {})
    child = os.fork()
    if child == 0:

        def kill(*arguments: object) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(checkpoint, moment, kill)
        save_checkpoint(tmp_path, 2, {"model": {"a": torch.zeros(3)}}, {})
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert any(tmp_path.glob(".step-*.partial/model/*.safetensors")), (
        "the kill came too early to show anything"
    )
    latest = latest_checkpoint(tmp_path)
    assert latest is not None and latest.name == "step-00000001"
    assert torch.equal(load_model_weights(latest, "model")["a"], torch.ones(3))
    # The next save clears what the killed one left.
    save_checkpoint(tmp_path, 2, {"model": {"a": torch.zeros(3)}}, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


@pytest.mark.skipif(
    not Path("/dev/full").exists() or os.geteuid() != 0, reason="needs root and a small tmpfs"
)
def test_a_full_disk_is_an_os_error_and_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(tmp_path)], check=False
    ).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        save_checkpoint(tmp_path, 1, {"model": {"a": torch.ones(1000)}}, {})
        with pytest.raises(OSError, match="could not be written.*No space left"):
            save_checkpoint(tmp_path, 2, {"model": {"a": torch.ones(1_000_000)}}, {})
        assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, {"model": {"a": torch.ones(3)}, "extra": {"b": torch.ones(1)}}, {"n": 1})
    path = save_checkpoint(tmp_path, 1, {"model": {"a": torch.zeros(3)}}, {"n": 2})
    assert read_state(path)["scalars"] == {"n": 2} and not (path / "extra").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_no_pickle_is_written(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, {"model": some_tensors(), "none": {}}, {"x": 1})
    names = [p.name for p in path.rglob("*") if p.is_file()]
    assert sum(name.endswith(".safetensors") for name in names) == 1
    assert all(name.endswith((".safetensors", ".json")) or name == MARKER for name in names)
    for file in (p for p in path.rglob("*") if p.is_file()):
        head = file.read_bytes()[:10]
        assert not head.startswith((b"\x80", b"PK")), f"{file} looks like a pickle or a torch.save archive"


def test_prune_keeps_the_last_the_milestones_and_the_last_finite_one(tmp_path: Path) -> None:
    for step in range(1, 10):
        value = float("nan") if step > 5 else 1.0
        save_checkpoint(tmp_path, step, {"model": {"a": torch.tensor([value])}}, {})
    removed = prune(tmp_path, keep_last=2, milestones=4)
    assert sorted(p.name[-1] for p in tmp_path.iterdir()) == ["4", "5", "8", "9"]
    assert sorted(p.name[-1] for p in removed) == ["1", "2", "3", "6", "7"]
    # A damaged one is none to go back to, however finite it was.
    next((tmp_path / "step-00000005" / "model").iterdir()).unlink()
    prune(tmp_path, keep_last=1)
    assert sorted(p.name[-1] for p in tmp_path.iterdir()) == ["4", "9"]
    with pytest.raises(ValueError, match="keep_last"):
        prune(tmp_path, keep_last=0)


def test_latest_is_the_highest_step_and_needs_its_marker(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None and latest_checkpoint(tmp_path / "none") is None
    for step in (9, 123456789, 10):
        save_checkpoint(tmp_path, step, {}, {})
    (tmp_path / "step-00000011").mkdir()
    latest = latest_checkpoint(tmp_path)
    assert latest is not None and latest.name == "step-123456789"
    (latest / MARKER).unlink()
    latest = latest_checkpoint(tmp_path)
    assert latest is not None and latest.name == "step-00000010"


def _two_ranks(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    whole = torch.arange(14.0).view(7, 2)  # 7 rows: uneven shards
    sharded, other = (
        distribute_tensor(whole, mesh, [Shard(0)]),
        distribute_tensor(whole * 0, mesh, [Shard(0)]),
    )
    bad = torch.tensor([1.0 if rank == 0 else float("nan")])
    path = save_checkpoint(f"{folder}/run", 1, {"model": {"w": sharded, "step": torch.tensor(2.0)}}, {"n": 3})
    assert load_checkpoint(path, {"model": {"w": other, "step": torch.tensor(0.0)}}) == {"n": 3}
    assert isinstance(other, DTensor) and torch.equal(other.full_tensor(), whole)
    second = save_checkpoint(
        f"{folder}/run", 2, {"model": {"w": DTensor.from_local(bad, mesh, [Shard(0)])}}, {}
    )
    assert not read_state(second)["finite"], "a NaN that only one rank holds went unseen"
    dist.barrier()  # who leaves while the other is still connected may abort it (gloo)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_write_what_one_process_reads(tmp_path: Path) -> None:
    mp.start_processes(_two_ranks, (str(tmp_path),), nprocs=2, start_method="spawn")
    path = tmp_path / "run" / "step-00000001"
    assert len(list((path / "model").glob("*.safetensors"))) == 2
    weights = load_model_weights(path, "model")
    assert torch.equal(weights["w"], torch.arange(14.0).view(7, 2)) and weights["step"] == 2
    (next(iter(sorted((path / "model").glob("*.safetensors"))))).unlink()
    with pytest.raises(ValueError, match="is missing"):
        load_model_weights(path, "model")
