"""IMM against values that its authors' code and independent float64 code gave. Wrong versions fail the same way."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from mmgen.objectives import IMM, Path
from mmgen.objectives import imm as imm_module
from tests.conformance.imm_vectors import (
    CHECKS,
    PATHS,
    Vectors,
    failures,
    jumps,
    kernels,
    samplers,
    schedules,
    training_step,
    training_times,
    u_statistic,
)


@pytest.fixture
def vectors(request: pytest.FixtureRequest) -> Vectors:
    return Vectors(request.config.option.imm_vectors)


@pytest.mark.parametrize("check", CHECKS)
def test_every_value_agrees(vectors: Vectors, check: Callable):
    assert failures(vectors, check) == []


def test_no_array_of_the_file_is_left_unused(vectors: Vectors):
    compared = [key for check in CHECKS for key, _ in check(vectors)]
    assert len(compared) == len(set(compared))
    assert set(vectors.arrays) == vectors.read | set(compared)


def test_a_change_of_any_array_is_noticed(vectors: Vectors):
    """Also of those that are only read: they decide what others come out as."""
    compared = {key for check in CHECKS for key, _ in check(vectors)}
    for key, kept in vectors.arrays.items():
        vectors.arrays[key] = kept + 1 if kept.dtype == torch.int64 else 1.001 * kept + 1e-3
        if key in compared:
            noticed = not vectors.agrees(key, kept)
        else:
            noticed = any(failure(vectors, check) for check in CHECKS)
        assert noticed, key
        vectors.arrays[key] = kept


def failure(vectors: Vectors, check: Callable) -> bool:
    return any(not vectors.agrees(key, ours) for key, ours in check(vectors))


def test_float32_is_close_enough_to_train_in(vectors: Vectors):
    for key, ours in [*kernels(vectors, torch.float32), *training_step(vectors, torch.float32)]:
        if key.endswith("mmd_u"):
            continue
        loose = (
            {"rtol": 1e-4, "atol": 0.0} if "loss" in key.rsplit("/", 1)[1] else {"rtol": 0.0, "atol": 2e-5}
        )
        if key.endswith("dloss_dy_st"):
            loose = {"rtol": 1e-3, "atol": 1e-7}
        assert vectors.agrees(key, ours, **loose), key


def wrong_versions() -> Iterator:
    """(where the mistake is made, what it replaces, by what, check, keys that must then fail)"""
    ddim, add_noise, c_out, mmd2 = Path.ddim, Path.add_noise, Path.c_out, imm_module.mmd2
    yield pytest.param(
        Path,
        "ddim",
        lambda self, x_t, x, t, s: ddim(self, x_t, x, s, t),
        schedules,
        [f"{schedule}/ddim_{form}" for schedule in ("fm", "vp_cosine") for form in ("xt_x0_s_t", "reuse")],
        id="ddim with s and t swapped",
    )
    yield pytest.param(
        Path,
        "add_noise",
        lambda self, x, noise, t: add_noise(self, x, noise / self.sigma_data, t),
        schedules,
        [f"{schedule}/{form}" for schedule in ("fm", "vp_cosine") for form in ("add_noise", "ddim_reuse")],
        id="noise of standard deviation 1",
    )
    yield pytest.param(
        Path,
        "add_noise",
        lambda self, x, noise, t: add_noise(self, x, noise / self.sigma_data, t),
        training_step,
        ["train/fm/euler_fm/stride/k12a2b4/x_t", "train/fm/euler_fm/stride/k12a2b4/loss"],
        id="noise of standard deviation 1 in training",
    )
    yield pytest.param(
        Path,
        "add_noise",
        lambda self, x, noise, t: add_noise(self, x, noise / self.sigma_data, t),
        samplers,
        ["sampler/fm/euler_fm/stride/uniform/2/nocfg/restart_f64",
         "sampler/fm/euler_fm/stride/uniform/2/nocfg/restart_official"],
        id="noise of standard deviation 1 at a restart",
    )  # fmt: skip
    yield pytest.param(
        IMM,
        "bandwidth",
        lambda self, t, s: c_out(self.path, t, 0.0).abs(),
        training_times,
        [f"wtilde/{schedule}/{prediction}" for schedule, prediction in PATHS if prediction != "identity"],
        id="the one-argument c_out(t) in the kernel",
    )
    yield pytest.param(
        IMM,
        "bandwidth",
        lambda self, t, s: c_out(self.path, t, 0.0).abs(),
        training_step,
        ["train/fm/euler_fm/stride/k12a2b4/mmd_v", "train/fm/euler_fm/stride/k12a2b4/loss"],
        id="the one-argument c_out(t) in the loss",
    )
    yield pytest.param(
        IMM,
        "bandwidth",
        lambda self, t, s: c_out(self.path, t, s),
        kernels,
        ["mmd/fm/euler_fm/a2b4/mmd_v", "mmd/fm/euler_fm/a2b4/loss", "mmd/fm/euler_fm/a2b4/dloss_dy_st"],
        id="c_out with its sign in the kernel",
    )
    yield pytest.param(
        imm_module,
        "mmd2",
        lambda y, z, h, *rest, **more: mmd2(y, z, h / y.shape[-1] ** 0.5, *rest, **more),
        kernels,
        ["mmd/fm/euler_fm/a2b4/mmd_v", "mmd/fm/euler_fm/a2b4/loss", "mmd/fm/euler_fm/a2b4/dloss_dy_st"],
        id="the distance over sqrt(D)",
    )
    yield pytest.param(
        imm_module,
        "mmd2",
        lambda y, z, h, *rest, **more: u_statistic(y, z, h),
        kernels,
        ["mmd/fm/euler_fm/a2b4/mmd_v", "mmd/fm/euler_fm/a2b4/loss", "mmd/fm/euler_fm/a2b4/dloss_dy_st"],
        id="a U-statistic",
    )
    yield pytest.param(
        Path,
        "c_out",
        lambda self, t, s: c_out(self, t, s) / self.sigma_data,
        jumps,
        ["fm/euler_fm/c_out_st", "fm/euler_fm/f_given_net_out", "fm/simple_edm/f_toy_stride_official"],
        id="c_out without sigma_data",
    )


@pytest.mark.parametrize(("where", "name", "wrong", "check", "broken"), list(wrong_versions()))
def test_a_wrong_version_fails_the_same_comparison(
    vectors: Vectors,
    monkeypatch: pytest.MonkeyPatch,
    where: Any,
    name: str,
    wrong: Callable,
    check: Callable,
    broken: list[str],
):
    monkeypatch.setattr(where, name, wrong)
    assert set(broken) <= set(failures(vectors, check))


def test_the_u_statistic_of_the_file_is_far_from_the_estimator(vectors: Vectors):
    """On coupled samples it is negative, since y_j and z_j share their data and noise."""
    for key, ours in kernels(vectors):
        if key.endswith("/mmd_v"):
            contrast = key.removesuffix("v") + "u"
            assert not vectors.agrees(contrast, ours)
            assert (vectors[contrast] < 0).all() and (ours > 0).all()


def test_a_sampler_that_starts_from_unit_noise_fails(vectors: Vectors):
    vectors.arrays["sampler/z"] = vectors.arrays["sampler/z"] / float(vectors["sigma_data"])
    failed = set(failures(vectors, samplers))
    # many restarts forget where they began
    assert {key for key in vectors.arrays if "/push_" in key} <= failed
    assert {key for key in vectors.arrays if "uniform/1/" in key and "/restart_" in key} <= failed
