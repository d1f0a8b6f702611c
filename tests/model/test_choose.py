"""What `auto` means, and the one line that refuses what cannot run."""

from typing import Any, cast

import pytest
import torch

from mmgen.model.attention import AttentionChoice, choose, choose_backend

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch):
    """A machine with a Hopper GPU and every package, as far as `choose` looks."""
    monkeypatch.setattr(choose, "find_spec", lambda _: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))


def test_auto_on_a_cpu_is_runs():
    choice = choose_backend("auto", CPU, 64, "bf16")
    assert choice.backend == "runs" and choice.why.startswith("auto: a CPU")


def test_auto_on_a_gpu_is_flex_where_it_can_and_dense_with_the_reason_elsewhere(
    hopper: None, monkeypatch: pytest.MonkeyPatch
):
    assert choose_backend("auto", GPU, 64, "bf16") == ("flex", "auto: skips what nobody reads")
    assert choose_backend("auto", GPU, 8, "bf16") == (
        "dense",
        "auto: flex needs model.head_dim of at least 16, not 8",
    )
    assert choose_backend("auto", GPU, 64, "float64").backend == "dense"
    monkeypatch.setattr(choose, "find_spec", lambda _: None)
    found = choose_backend("auto", GPU, 64, "bf16")
    assert found.backend == "dense" and found.why.startswith("auto: flex needs the package triton")
    assert choose.preferred("cuda", 64, "bf16").backend == "flex", "whatever this machine has"
    assert choose.preferred("mps", 64, "bf16").backend == "dense"


def test_what_is_asked_for_is_taken(hopper: None):
    for asked in ("dense", "runs", "flex", "varlen", "flash2", "flash3", "xformers"):
        assert choose_backend(cast(AttentionChoice, asked), GPU, 64, "bf16") == (asked, "as asked")


@pytest.mark.parametrize(
    ("asked", "changes", "message"),
    [
        (
            "flex",
            {"device": CPU},
            "flex needs a CUDA device to train on, not cpu; here auto would do, or dense, runs$",
        ),
        (
            "varlen",
            {"precision": "float32"},
            "varlen computes in train.precision bf16, not float32; .*, xformers$",
        ),
        (
            "xformers",
            {"precision": "float64"},
            "xformers computes in train.precision bf16 or float32, not float64",
        ),
        ("flash2", {"head_dim": 20}, "flash2 needs model.head_dim to be a multiple of 8 up to 256, not 20"),
        ("flex", {"head_dim": 8}, "flex needs model.head_dim of at least 16, not 8"),
        (
            "flash2",
            {"missing": "flash_attn"},
            r"needs the package flash_attn: pip install 'mmgen-pretrain\[flash\]'",
        ),
        (
            "xformers",
            {"missing": "xformers"},
            r"pip install 'mmgen-pretrain\[xformers\]'; here auto would do",
        ),
        (
            "flash3",
            {"missing": "flash_attn_interface"},
            "the folder hopper of github.com/Dao-AILab/flash-attention",
        ),
        (
            "flash3",
            {"capability": (8, 0)},
            r"flash3 needs a GPU of the generation Hopper \(9.0\), not 8.0; .*flash2",
        ),
        ("flash3", {"capability": (10, 0)}, "not 10.0"),
        ("varlen", {"capability": (7, 5)}, r"Ampere \(8.0\) or later, not 7.5"),
    ],
)
def test_what_cannot_run_is_refused_in_a_line(
    asked: AttentionChoice,
    changes: dict[str, Any],
    message: str,
    hopper: None,
    monkeypatch: pytest.MonkeyPatch,
):
    if "missing" in changes:
        missing = changes["missing"]
        monkeypatch.setattr(choose, "find_spec", lambda name: None if name == missing else object())
    if "capability" in changes:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: changes["capability"])
    given = {"device": GPU, "head_dim": 64, "precision": "bf16", **changes}
    with pytest.raises(ValueError, match=message) as caught:
        choose_backend(asked, given["device"], given["head_dim"], given["precision"])
    assert "\n" not in str(caught.value)
