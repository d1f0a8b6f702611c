"""Inductive Moment Matching (IMM, arXiv 2503.07565): M samples jumped to s from t, and from a nearer r, are one law.

Pure functions of outputs and times: the passes that make them, noise and packing are elsewhere. Kernel and loss are in
float32 at least whatever comes in. G groups, M particles of a group, D numbers of one particle (a block of tokens,
flattened; never one token or channel).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmgen.objectives.base import Objective, Times
from mmgen.objectives.path import Path, Time
from mmgen.sequence import Grouping

# |c_out| below this (t - s < 2e-6) counts as this: at t = s the kernel would divide by zero. The gradient on G, which
# |c_out| multiplies again, is only made smaller.
SMALLEST_BANDWIDTH = 1e-6

# With t - r below this the gradient in bfloat16 has a cosine of .85 down to 0 with float32's, and above .9 from it on
# (benchmarks/results/imm_precision.json).
LEAST_GAP_BF16 = 0.003


@dataclass(frozen=True)
class IMMConfig:
    """Defaults are those of the paper's ImageNet runs (table 5). Raises ValueError where a value makes no sense."""

    name: Literal["imm"] = "imm"
    path: Path = field(default_factory=Path)
    particles: int = 4
    """M, the samples that a kernel compares; they share (t, s, r)"""
    grouping: Literal["across", "context", "within"] = "across"
    """a group's particles are of different pictures; of pictures with one caption, as far as a batch has M of them; or
    noise draws of one picture (its copies then a multiple of M)"""
    k: float = 12.0
    """the target pass starts (eta_max - eta_min) / 2^k nearer to the data, in eta = sigma / alpha"""
    k_final: float | None = None
    """k at the end of training, reached linearly; None keeps k"""
    s_power: float = 1.0
    """s = t u^s_power with u uniform: below 1 more short jumps, above 1 more long ones"""
    from_noise: float = 0.0
    """share of the groups whose t is the path's t_max, where sampling begins"""
    to_data: float = 0.0
    """share of the groups whose s is the path's t_min, where sampling ends"""
    gap: float = 0.0
    """t - r is at least this (where s leaves room), so that low precision tells them apart; 0.0001 in the paper"""
    eta_min: float = 0.0
    eta_max: float = 160.0
    """the range that k divides; the authors' training code may have taken eta(t_max) = 165.7, a k larger by 0.05"""
    a: float = 1.0
    """power of alpha in the weight of t: 1 is better at one step, 2 at many steps and in low precision"""
    b: float = 4.0
    """the weight's sigmoid is centred at log_snr = b"""
    bandwidth: float = 1.0
    """the kernel's width, in units of |c_out(t, s)| D"""
    floor: float = 1e-8
    """two samples nearer than this count as this far apart and feel no gradient"""
    across_contexts: float = 1.0
    """what the kernel counts of two samples that read different contexts (captions): 1 compares pictures alone"""
    anchors: float = 0.0
    """share of groups with s = t, which learn the velocity there by flow matching's loss: truth at every time"""
    anchors_final: float | None = None
    """this share at the end of training, reached linearly; None keeps it"""

    def __post_init__(self) -> None:
        t_min, t_max = self.path.time_range
        if t_max == 1:
            raise ValueError(
                "path.t_max 1.0 must be below 1: eta is infinite there and no decrement reduces it"
            )
        if self.particles < 1:
            raise ValueError(f"particles {self.particles} must be at least 1")
        for name, k in (("k", self.k), ("k_final", self.k_final)):
            if k is not None and not 0 <= k <= 40:
                raise ValueError(f"{name} {k} must be in [0, 40]")
        if not 0 <= self.gap < t_max - t_min:
            raise ValueError(
                f"gap {self.gap} must be in [0, {t_max - t_min:g}), the length of the time range"
            )
        if not 0 <= self.eta_min < self.eta_max < math.inf:
            raise ValueError(f"eta_min {self.eta_min} and eta_max {self.eta_max} must satisfy 0 <= min < max")
        if not self.a >= 0:
            raise ValueError(f"a {self.a} must be at least 0")
        if not abs(self.b) <= 40:
            raise ValueError(f"b {self.b} must be in [-40, 40]")
        for name in ("bandwidth", "floor", "s_power"):
            value = getattr(self, name)
            if not value > 0:
                raise ValueError(f"{name} {value} must be positive")
        shares = {
            name: getattr(self, name)
            for name in ("across_contexts", "from_noise", "to_data", "anchors", "anchors_final")
        }
        for name, value in shares.items():
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} {value} must be in [0, 1]")


def laplace_m1(
    a: Float[Tensor, "G M D"], b: Float[Tensor, "G M D"], bandwidth: Float[Tensor, "G"], floor: float = 1e-8
) -> Float[Tensor, "G M M"]:
    """k - 1 for every pair, k = exp(-max(|a_j - b_l|, floor) / (D bandwidth)); the norm is not squared (IMM, C.8).

    k - 1 keeps the digits that k has not: at image size k is within 1e-4 of 1, and the ones cancel in MMD^2 anyway.
    Distances come from differences, since a product of matrices loses those of near particles.
    """
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    square = (a.to(dtype)[:, :, None] - b.to(dtype)[:, None]).square().sum(-1)
    apart = square > floor**2
    # `where` twice: the root's gradient at 0 is infinite, and would reach the sum as infinity times zero
    distance = torch.where(apart, torch.where(apart, square, 1.0).sqrt(), floor)
    return torch.expm1(-distance / (a.shape[-1] * bandwidth.to(dtype))[:, None, None])


def mmd2(
    y: Float[Tensor, "G M D"],
    z: Float[Tensor, "G M D"],
    bandwidth: Float[Tensor, "G"],
    floor: float = 1e-8,
    share: Float[Tensor, "G M M"] | float = 1.0,
) -> Float[Tensor, "G"]:
    """MMD^2 of each group, as a V-statistic: k(y, y) + k(z, z) - 2 k(y, z), averaged over all M^2 pairs (IMM, eq. 67).

    The diagonals of k(y, y) and k(z, z) count. Without them (a U-statistic) the value goes far below zero, since y_j
    and z_j share their data and noise, and outputs that match their targets are still driven apart.

    `share` multiplies the kernel of each pair of particles, as a kernel on what they are conditioned on does.
    """
    own, other, both = (laplace_m1(p, q, bandwidth, floor) for p, q in ((y, y), (z, z), (y, z)))
    return (share * (own + other - 2 * both)).mean((-2, -1))


def _linear(begin: float, end: float | None, fraction: float) -> float:
    return begin if end is None else begin + (end - begin) * fraction


class IMM(Objective):
    """w(t) MMD^2 between jumps to s from t (the student) and from r (the same network, without gradient)."""

    needs_target = True

    def __init__(self, config: IMMConfig) -> None:
        super().__init__(config.path, Grouping(config.particles, config.grouping))
        self.config = config
        self.anchored = config.anchors > 0 or bool(config.anchors_final)
        self._weight_rms = self._root_mean_square_weight()

    def draw_times(
        self,
        draw_time: Callable[[np.random.Generator], float],
        draw: np.random.Generator,
        fraction: float = 0.0,
    ) -> Times:
        """t is the modality's draw stretched over the path's time range, s between t_min and t; the ends of the range,
        which every sampler visits and no such draw does, are given their shares."""
        t_min, t_max = self.path.time_range
        c = self.config
        t = (
            t_max
            if c.from_noise and draw.random() < c.from_noise
            else t_min + (t_max - t_min) * draw_time(draw)
        )
        s = t_min + (t - t_min) * draw.random() ** c.s_power
        if c.to_data and draw.random() < c.to_data:
            s = t_min
        anchors = _linear(self.config.anchors, self.config.anchors_final, fraction)
        if anchors > 0 and draw.random() < anchors:
            return Times(t, t, t)
        return Times(t, s, float(self.target_time(t, s, fraction)))

    def told_target(self, t: Tensor, s: Tensor) -> Tensor:
        return s

    def decrement(self, fraction: float = 0.0) -> float:
        """How much nearer to the data the target pass starts, in eta, when `fraction` of the training is done."""
        assert 0 <= fraction <= 1, f"fraction {fraction}"
        c = self.config
        return (c.eta_max - c.eta_min) / 2 ** _linear(c.k, c.k_final, fraction)

    def target_time(self, t: Time, s: Time, fraction: float = 0.0) -> Float[Tensor, "..."]:
        """r(s, t): a constant decrement in eta, and at least `gap`, but never past s. In float64.

        Where r = s the target is x_s itself: real data, noised. Truth enters there and nowhere else.
        """
        t, s = (torch.as_tensor(time, dtype=torch.float64) for time in (t, s))
        eta = (self.path.eta(t) - self.decrement(fraction)).clamp(min=self.config.eta_min)
        return torch.maximum(s, torch.minimum(t - self.config.gap, self.path.eta_inverse(eta)))

    def weight(self, t: Time) -> Float[Tensor, "..."]:
        """w(t) = 1/2 sigmoid(b - log_snr) (-d log_snr / dt) alpha^a / (alpha^2 + sigma^2). In float64.

        With eta = sigma / alpha written out, so that it is 0 at t = 0, where the product is 0 times infinity.
        """
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        a, b, rate = self.config.a, self.config.b, self.path.rate
        centred = alpha.square() * math.exp(-b) + sigma.square()
        return rate * sigma * alpha ** (a - 1) / (centred * (alpha.square() + sigma.square()))

    def bandwidth(self, t: Time, s: Time) -> Float[Tensor, "..."]:
        """The kernel's width per dimension: |c_out(t, s)| (IMM, C.8) times the config's factor. In float64."""
        return self.config.bandwidth * self.path.c_out(t, s).abs().clamp(min=SMALLEST_BANDWIDTH)

    def scale(self, dim: int) -> float:
        """What brings w(t) MMD^2 of blocks of `dim` numbers to flow matching's scale: M h sqrt(2 dim) / RMS(w).

        The kernel's gradient has the norm 1 / (dim h |c_out|) at any distance (h: the config's bandwidth), |c_out|
        takes it to G, and the V-statistic counts a particle's coupled pair 2 / M^2 times; so with every token of the
        group bearing `group_loss`, the mean over E numbers has a gradient of RMS 2 scale w / (M h sqrt(dim) E) on G.
        Flow matching's is 2 |G - target| / E, with |G - target| = sqrt(2) where training begins (G = 0, data and
        noise of equal variance). RMS(w) is over times uniform on the path's range.
        """
        return self.particles * self.config.bandwidth * math.sqrt(2 * dim) / self._weight_rms

    def group_loss(
        self,
        student: Float[Tensor, "G M D"],
        target: Float[Tensor, "G M D"],
        x_t: Float[Tensor, "G M D"],
        x_r: Float[Tensor, "G M D"],
        t: Float[Tensor, "G"],
        s: Float[Tensor, "G"],
        r: Float[Tensor, "G"],
        velocity: Float[Tensor, "G M D"] | None = None,
        same_context: Bool[Tensor, "G M M"] | None = None,
    ) -> Float[Tensor, "G"]:
        """scale(D) w(t) MMD^2; no gradient reaches `target` or x_r. Times in float64, or r is lost between t and s.

        Groups with s = t are anchors where `velocity` is given: their loss is flow matching's.
        """
        assert student.shape[1] == self.particles, f"{student.shape[1]} particles, not {self.particles}"
        t, s, r = (time.double()[:, None, None] for time in (t, s, r))
        y = self.path.jump(student, x_t, t, s)
        z = self.path.jump(target, x_r, r, s).detach()
        share: Tensor | float = 1.0
        if same_context is not None and self.config.across_contexts < 1:
            share = torch.where(same_context, 1.0, self.config.across_contexts)
        c = self.config
        distance = mmd2(y, z, self.bandwidth(t, s).flatten(), c.floor, share)
        loss = self.scale(y.shape[-1]) * self.weight(t).flatten().to(distance.dtype) * distance
        if velocity is None:
            return loss
        anchor = (student.to(distance.dtype) - velocity.to(distance.dtype)).square().mean((-2, -1))
        return torch.where((t == s).flatten(), anchor, loss)

    def _root_mean_square_weight(self) -> float:
        t_min, t_max = self.path.time_range
        t = t_min + (t_max - t_min) * (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
        return float(self.weight(t).square().mean().sqrt())
