"""Every value of the reference file, computed through mmgen's public functions. The tests beside it compare.

The file holds what the authors' sampling code returned (keys ending in `_official`; its network works in float32) and
what independent float64 code did (all others). The network is a closed form, given by the arrays toy_*.
"""

from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path as File

import numpy as np
import torch
from torch import Tensor

from mmgen.model.trunk import TrunkConfig
from mmgen.objectives import IMM, IMMConfig, Path
from mmgen.objectives import imm as imm_module
from mmgen.objectives.path import Prediction, Schedule
from mmgen.sampling.loops import (
    Output,
    edm_grid,
    guided,
    one_by_one,
    pushforward,
    restart,
    through_grid,
    uniform_grid,
)

SCHEDULES: tuple[Schedule, ...] = ("fm", "vp_cosine")
PATHS: tuple[tuple[Schedule, Prediction], ...] = (
    ("fm", "identity"),
    ("fm", "simple_edm"),
    ("fm", "euler_fm"),
    ("vp_cosine", "identity"),
    ("vp_cosine", "simple_edm"),
)
SECOND_TIMES = ("identity", "stride")

Computed = Iterator[tuple[str, Tensor]]


class Vectors:
    """The arrays of the file, and which of them were read."""

    def __init__(self, file: File) -> None:
        with np.load(file, allow_pickle=False) as arrays:
            self.arrays = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Tensor:
        self.read.add(key)
        return self.arrays[key]

    def agrees(self, key: str, ours: Tensor | float, rtol: float = 1e-9, atol: float = 1e-12) -> bool:
        """Whether `ours` is the array `key`; what was computed in float32 there is compared at float32's precision."""
        if key.endswith("_official"):
            rtol, atol = 0.0, 2e-5
        elif key.endswith("_rosinality"):
            rtol = 1e-5
        theirs, ours = self[key].double(), torch.as_tensor(ours).double()
        return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=rtol, atol=atol)

    def path(self, schedule: Schedule, prediction: Prediction, t_min: float = 0.0) -> Path:
        return Path(schedule, prediction, float(self["sigma_data"]), t_min)


def any_path(vectors: Vectors, schedule: Schedule) -> Path:
    """For what does not depend on the prediction."""
    return vectors.path(schedule, "simple_edm")


def per_row(times: Tensor) -> Tensor:
    return times.view(-1, 1, 1, 1)


def toy(vectors: Vectors, path: Path, second_time: str, onehot: Tensor | None) -> Callable[..., Tensor]:
    """G(x, t, s) of the file's network; t and s are floats or [B, 1, 1, 1]."""

    def output(x: Tensor, t: Tensor | float, s: Tensor | float) -> Tensor:
        column = [torch.as_tensor(time, dtype=torch.float64).reshape(-1, 1) for time in (t, s)]
        now = TrunkConfig.time_scale * column[0]
        other = TrunkConfig.time_scale * (column[1] if second_time == "identity" else column[0] - column[1])
        flat = (path.c_in(t) * x).flatten(1)
        z = flat @ vectors["toy_W"].T + vectors["toy_b"]
        z = z + now / 1000 * vectors["toy_u"] + other / 1000 * vectors["toy_v"]
        if onehot is not None:
            z = z + onehot @ vectors["toy_E"]
        return (z.tanh() + 0.25 * flat).view_as(x)

    return output


def with_guidance(vectors: Vectors, path: Path, second_time: str, onehot: Tensor, guidance: float) -> Output:
    conditional = toy(vectors, path, second_time, onehot)
    null = toy(vectors, path, second_time, torch.zeros_like(onehot))
    return guided(one_by_one(conditional, null), guidance)


def schedules(vectors: Vectors) -> Computed:
    yield "time_scale", torch.tensor(TrunkConfig.time_scale)
    t, s = vectors["grid_t"], vectors["grid_s"]
    x, noise, x_t = vectors["x0"], vectors["noise"], vectors["x_t"]
    for schedule in SCHEDULES:
        path = any_path(vectors, schedule)
        t_min, t_max = path.time_range
        on_path = path.add_noise(x, noise, per_row(t))
        for name, ours in {
            "alpha_t": path.alpha(t),
            "sigma_t": path.sigma(t),
            "logsnr_t": path.log_snr(t),
            "eta_t": path.eta(t),
            "eta_inv_of_eta_t": path.eta_inverse(path.eta(t)),
            "T": torch.tensor(t_max, dtype=torch.float64),
            "eps": torch.tensor(t_min, dtype=torch.float64),
            "eta_max": path.eta(t_max),
            "eta_min": path.eta(t_min),
            "add_noise": on_path,
            "ddim_xt_x0_s_t": path.ddim(x_t, x, per_row(t), per_row(s)),
            "ddim_reuse": path.ddim(on_path, x, per_row(t), per_row(s)),
            "ddim_reuse_with_noise": path.add_noise(x, noise, per_row(s)),
        }.items():
            yield f"{schedule}/{name}", ours


def jumps(vectors: Vectors) -> Computed:
    t, s, x_t, onehot = (vectors[key] for key in ("grid_t", "grid_s", "x_t", "onehot"))
    for schedule, prediction in PATHS:
        path, prefix = vectors.path(schedule, prediction), f"{schedule}/{prediction}"
        yield f"{prefix}/c_in", path.c_in(t)
        yield f"{prefix}/c_skip_st", path.c_skip(t, s)
        yield f"{prefix}/c_out_st", path.c_out(t, s)
        given = path.jump(vectors["net_out"], x_t, per_row(t), per_row(s))
        yield f"{prefix}/f_given_net_out", given
        for second in SECOND_TIMES:
            output = toy(vectors, path, second, onehot)(x_t, per_row(t), per_row(s))
            own, at = x_t[3:4], (float(t[3]), float(s[3]))
            mixed = with_guidance(vectors, path, second, onehot[3:4], 1.5)(own, *at)
            for source in ("official", "f64"):
                landed = path.jump(output, x_t, per_row(t), per_row(s))
                yield f"{prefix}/f_toy_{second}_{source}", landed
                yield f"{prefix}/f_toy_cfg1.5_row3_{second}_{source}", path.jump(mixed, own, *at)


def samplers(vectors: Vectors) -> Computed:
    x, onehot = vectors["sampler/z"], vectors["sampler/onehot"]
    unit_noise = vectors["sampler/restart_unit_noise"]
    grids: dict[str, Callable[[Path, int], list[float]]] = {
        "uniform": lambda path, steps: uniform_grid(steps, *path.time_range),
        "edm": edm_grid,
    }
    for schedule, grid, steps in product(SCHEDULES, grids, (1, 2, 4, 8)):
        times = grids[grid](any_path(vectors, schedule), steps)
        yield f"sampler/{schedule}/{grid}/{steps}/t_steps", torch.tensor(times, dtype=torch.float64)
    for (schedule, prediction), second, grid, steps, guidance in product(
        PATHS, SECOND_TIMES, grids, (1, 2, 4, 8), (1.0, 1.5)
    ):
        path = vectors.path(schedule, prediction)
        times = grids[grid](path, steps)
        output = with_guidance(vectors, path, second, onehot, guidance)
        pushed = pushforward(output, path.jump, x, times)
        noise = path.sigma_data * unit_noise
        restarted = restart(output, path.jump, path.add_noise, x, times, noise.__getitem__)
        setting = f"{grid}/{steps}/{'nocfg' if guidance == 1 else 'cfg1.5'}"
        prefix = f"sampler/{schedule}/{prediction}/{second}/{setting}"
        for source in ("official", "f64"):
            yield f"{prefix}/push_{source}", pushed
            yield f"{prefix}/restart_{source}", restarted
    cifar = vectors.path("fm", "simple_edm", t_min=0.006)
    times = through_grid(cifar, [float(cifar.eta_inverse(1.4))])
    yield "sampler/cifar_2step/t_steps", torch.tensor(times, dtype=torch.float64)
    pushed = pushforward(toy(vectors, cifar, "identity", None), cifar.jump, x, times)
    yield "sampler/cifar_2step/push_official", pushed
    yield "sampler/cifar_2step/push_f64", pushed


def training_times(vectors: Vectors) -> Computed:
    t, s = vectors["r/t"], vectors["r/s"]
    for schedule in SCHEDULES:
        path = any_path(vectors, schedule)
        eta_of_range = float(path.eta(path.time_range[1]))
        for k, gap, (name, eta_max) in product(
            (10, 12, 15), (0, 1e-4), (("code", eta_of_range), ("eta160", 160.0))
        ):
            imm = IMM(IMMConfig(path=path, k=k, gap=gap, eta_min=0.0, eta_max=eta_max))
            yield (
                f"r/{schedule}/k{k}/delta{gap:.4f}".replace("0.0000", "0") + f"/{name}",
                imm.target_time(t, s),
            )
        for a, b in product((1, 2), (4, 5)):
            yield f"w/{schedule}/a{a}/b{b}", IMM(IMMConfig(path=path, a=a, b=b)).weight(t)
        yield f"w/{schedule}/neg_dlogsnr_dt", -path.log_snr_derivative(t)
    for schedule, prediction in PATHS:
        imm = IMM(IMMConfig(path=vectors.path(schedule, prediction)))
        yield f"wtilde/{schedule}/{prediction}", 1 / imm.bandwidth(t, s)


MMD_SETTINGS: tuple[tuple[Schedule, Prediction, int, int], ...] = (
    ("fm", "euler_fm", 2, 4),
    ("fm", "euler_fm", 1, 4),
    ("fm", "simple_edm", 1, 5),
    ("vp_cosine", "simple_edm", 1, 4),
    ("fm", "identity", 1, 4),
)


def kernels(vectors: Vectors, dtype: torch.dtype = torch.float64) -> Computed:
    t, s = vectors["mmd/t"], vectors["mmd/s"]
    for schedule, prediction, a, b in MMD_SETTINGS:
        prefix = f"mmd/{schedule}/{prediction}/a{a}b{b}"
        imm = IMM(IMMConfig(path=vectors.path(schedule, prediction), a=a, b=b))
        y = vectors["mmd/y_st"].to(dtype).requires_grad_()
        z = vectors["mmd/y_sr"].to(dtype)
        bandwidth = imm.bandwidth(t, s)
        yield f"{prefix}/wtilde", 1 / bandwidth
        yield f"{prefix}/w", imm.weight(t)
        kernel = {
            name: 1 + imm_module.laplace_m1(p, q, bandwidth)
            for name, p, q in (("tt", y, y), ("rr", z, z), ("tr", y, z))
        }
        for name, values in kernel.items():
            yield f"{prefix}/K_{name}", values.detach()
        value = imm_module.mmd2(y, z, bandwidth)
        yield f"{prefix}/mmd_v", value.detach()
        # the authors' floor on the squared distance, 1e-8, is one of 1e-4 on the distance
        yield f"{prefix}/mmd_v_sqfloor1e-8", imm_module.mmd2(y, z, bandwidth, floor=1e-4).detach()
        yield f"{prefix}/mmd_u", u_statistic(y, z, bandwidth).detach()
        loss = imm_loss_at(imm, y, z, t, s)
        yield f"{prefix}/loss_per_group", loss.detach()
        yield f"{prefix}/loss", loss.mean().detach()
        if (schedule, prediction, a, b) == ("fm", "euler_fm", 2, 4):
            yield f"{prefix}/loss_rosinality", loss.mean().detach()
        (gradient,) = torch.autograd.grad(loss.mean(), y)
        yield f"{prefix}/dloss_dy_st", gradient


def imm_loss_at(imm: IMM, y: Tensor, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """w MMD^2 by `group_loss` of jumps that land on y and z: both from 0 at t, so that equals stay equal."""
    share = imm.path.c_out(t, s)[:, None, None].to(y.dtype)
    zero = torch.zeros_like(z)
    return imm.group_loss(y / share, z / share, zero, zero, t, s, t) / imm.scale(y.shape[-1])


def u_statistic(y: Tensor, z: Tensor, bandwidth: Tensor) -> Tensor:
    """MMD^2 without the diagonals of k(y, y) and k(z, z): what IMM does NOT take."""
    count = y.shape[1]
    own, other, both = (1 + imm_module.laplace_m1(p, q, bandwidth) for p, q in ((y, y), (z, z), (y, z)))
    apart = 1 - torch.eye(count, dtype=y.dtype)
    pairs = ((own + other) * apart).sum((-2, -1)) / (count * (count - 1))
    return pairs - 2 * both.mean((-2, -1))


TRAIN_SETTINGS: tuple[tuple[Schedule, Prediction, str, int, int, int], ...] = (
    ("fm", "euler_fm", "stride", 12, 2, 4),
    ("fm", "euler_fm", "identity", 12, 1, 4),
    ("fm", "simple_edm", "identity", 15, 1, 5),
    ("vp_cosine", "simple_edm", "identity", 12, 1, 4),
)


def training_step(vectors: Vectors, dtype: torch.dtype = torch.float64) -> Computed:
    x, noise, onehot = (vectors[f"train/{key}"] for key in ("x0", "noise", "onehot"))
    t, s = vectors["train/t_group"], vectors["train/s_group"]
    particles = len(x) // len(t)
    yield "train/M", torch.tensor(particles)
    for schedule, prediction, second, k, a, b in TRAIN_SETTINGS:
        prefix = f"train/{schedule}/{prediction}/{second}/k{k}a{a}b{b}"
        path = vectors.path(schedule, prediction)
        eta_max = float(path.eta(path.time_range[1]))
        imm = IMM(IMMConfig(path=path, particles=particles, k=k, eta_max=eta_max, a=a, b=b))
        r = imm.target_time(t, s)
        yield f"{prefix}/r_group", r
        each_t, each_s, each_r = (per_row(time.repeat_interleave(particles)) for time in (t, s, r))
        x_t = path.add_noise(x.to(dtype), noise.to(dtype), each_t)
        x_r = path.add_noise(x.to(dtype), noise.to(dtype), each_r)
        yield f"{prefix}/x_t", x_t
        yield f"{prefix}/x_r", x_r
        network = toy(vectors, path, second, onehot)
        student = network(x_t.double(), each_t, each_s).to(dtype)
        target = network(x_r.double(), each_r, each_s).to(dtype)
        shape = (len(t), particles, -1)
        y = path.jump(student, x_t, each_t, each_s).reshape(shape)
        z = path.jump(target, x_r, each_r, each_s).reshape(shape)
        yield f"{prefix}/f_st", y
        yield f"{prefix}/f_st_official", y
        yield f"{prefix}/f_sr", z
        yield f"{prefix}/wtilde", 1 / imm.bandwidth(t, s)
        yield f"{prefix}/w", imm.weight(t)
        yield f"{prefix}/mmd_v", imm_module.mmd2(y, z, imm.bandwidth(t, s))
        own, other, at_t, at_r = (values.reshape(shape) for values in (student, target, x_t, x_r))
        loss = imm.group_loss(own, other, at_t, at_r, t, s, r) / imm.scale(y.shape[-1])
        yield f"{prefix}/loss", loss.mean()


CHECKS = (schedules, jumps, training_times, kernels, training_step, samplers)


def failures(vectors: Vectors, check: Callable[[Vectors], Computed]) -> list[str]:
    """Keys whose array is not what mmgen computes."""
    return [key for key, ours in check(vectors) if not vectors.agrees(key, ours)]
