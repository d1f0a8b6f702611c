"""The path from data to noise, and the only interpreter of the network's output. Knows no loss and no network.

x_t = alpha(t) x + sigma(t) e with e ~ N(0, sigma_data^2) and t in [0, 1], t = 0 data. Functions of time alone take
floats or tensors, compute in float64 and return float64: times lie closer together than float32 tells apart. What
they multiply keeps its own type, float32 at least. Arguments are ordered as time flows: from t, then to s <= t.
The parameterizations are those of Inductive Moment Matching (IMM, arXiv 2503.07565, section 5).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Schedule = Literal["fm", "vp_cosine"]
Prediction = Literal["euler_fm", "simple_edm", "identity"]
Time = Float[Tensor, "..."] | float

# IMM's T, where eta = sigma / alpha is about 160: past it there is nothing left to tell from noise.
LAST_TIME: dict[Schedule, float] = {"fm": 0.994, "vp_cosine": 0.996}


@dataclass(frozen=True)
class Path:
    """A schedule (alpha, sigma) and what the network's output G means on it.

    `fm` is the straight line alpha = 1 - t, sigma = t; `vp_cosine` the quarter circle cos(pi t / 2), sin(pi t / 2).
    For one pair (x, e), sigma_data G stands for e - x (`euler_fm`, on `fm` only) or
    (alpha e - sigma x) / sqrt(alpha^2 + sigma^2) (`simple_edm`), or G itself for x (`identity`).
    Raises ValueError where the parts do not fit together.
    """

    schedule: Schedule = "fm"
    prediction: Prediction = "euler_fm"
    sigma_data: float = 0.5
    """standard deviation of the data, and of the noise"""
    t_min: float = 0.0
    """the time at which sampling ends and training begins; 0 for latents, 0.006 for pixels in IMM"""
    t_max: float | None = None
    """the time at which sampling begins; None is the schedule's own, 0.994 (fm) or 0.996 (vp_cosine)"""

    def __post_init__(self) -> None:
        if self.prediction == "euler_fm" and self.schedule != "fm":
            raise ValueError(
                f"prediction euler_fm needs the schedule fm, not {self.schedule}: take simple_edm or identity"
            )
        if not self.sigma_data > 0:
            raise ValueError(f"sigma_data {self.sigma_data} must be positive")
        t_min, t_max = self.time_range
        if not 0 <= t_min < t_max <= 1:
            raise ValueError(f"t_min {t_min} and t_max {t_max} must satisfy 0 <= t_min < t_max <= 1")

    @property
    def time_range(self) -> tuple[float, float]:
        """(t_min, t_max), t_max resolved: the times that training draws from and sampling runs between.

        The functions below hold on all of [0, 1] whatever the range.
        """
        return self.t_min, LAST_TIME[self.schedule] if self.t_max is None else self.t_max

    def alpha(self, t: Time) -> Float[Tensor, "..."]:
        # a sine, so that alpha(1) is exactly 0
        t = _float64(t)
        return 1 - t if self.schedule == "fm" else torch.sin(math.pi / 2 * (1 - t))

    def sigma(self, t: Time) -> Float[Tensor, "..."]:
        t = _float64(t)
        return t if self.schedule == "fm" else torch.sin(math.pi / 2 * t)

    @property
    def rate(self) -> float:
        """alpha sigma' - sigma alpha', a constant on both schedules: eta' = rate / alpha^2."""
        return 1.0 if self.schedule == "fm" else math.pi / 2

    def eta(self, t: Time) -> Float[Tensor, "..."]:
        """sigma / alpha, from 0 (data) to infinity (noise)."""
        return self.sigma(t) / self.alpha(t)

    def eta_inverse(self, eta: Time) -> Float[Tensor, "..."]:
        """The time t with eta(t) = `eta`."""
        eta = _float64(eta)
        # in this form infinity maps to 1
        return 1 / (1 + 1 / eta) if self.schedule == "fm" else torch.atan(eta) * (2 / math.pi)

    def log_snr(self, t: Time) -> Float[Tensor, "..."]:
        """log(alpha^2 / sigma^2), from infinity (data) to minus infinity (noise)."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def log_snr_derivative(self, t: Time) -> Float[Tensor, "..."]:
        """d log_snr / dt, negative; minus infinity at t = 0 and t = 1."""
        return -2 * self.rate / (self.alpha(t) * self.sigma(t))

    def c_in(self, t: Time) -> Float[Tensor, "..."]:
        """What brings x_t to unit variance: 1 / (sigma_data sqrt(alpha^2 + sigma^2)) (IMM, C.5)."""
        return 1 / (self.sigma_data * self._norm(t))

    def c_skip(self, t: Time, s: Time) -> Float[Tensor, "..."]:
        """The share of x_t in a jump from t to s; 1 at s = t."""
        if self.prediction == "identity":
            return self._line(t, s)[0]
        if self.prediction == "euler_fm":
            return torch.ones_like(_float64(t) - _float64(s))
        # numerator and denominator are the same products at s = t, so that their ratio is exactly 1 there
        alpha, sigma = self.alpha(t), self.sigma(t)
        return (alpha * self.alpha(s) + sigma * self.sigma(s)) / (alpha * alpha + sigma * sigma)

    def c_out(self, t: Time, s: Time) -> Float[Tensor, "..."]:
        """The share of G in a jump from t to s, with its sign (negative but for `identity`); 0 at s = t.

        It depends on BOTH times: c_out(t, 0) is another quantity, and IMM's kernel needs |c_out(t, s)|.
        """
        if self.prediction == "identity":
            return self._line(t, s)[1]
        step = -self.sigma_data * self._turn(t, s)
        return step if self.prediction == "euler_fm" else step / self._norm(t)

    def add_noise(
        self, x: Float[Tensor, "..."], noise: Float[Tensor, "..."], t: Time
    ) -> Float[Tensor, "..."]:
        """x_t. `noise` has standard deviation sigma_data; t broadcasts."""
        return _combine(self.alpha(t), x, self.sigma(t), noise)

    def ddim(
        self, x_t: Float[Tensor, "..."], x: Float[Tensor, "..."], t: Time, s: Time
    ) -> Float[Tensor, "..."]:
        """x_s on the line through the noisy `x_t` and the clean `x`: FROM t TO s, the order of the authors' code.

        The paper writes the same function DDIM(x_t, x, s, t). Where the pair's noise is known this is
        `add_noise(x, noise, s)`, which divides by nothing: training takes that form.
        """
        keep, clean = self._line(t, s)
        return _combine(keep, x_t, clean, x)

    def jump(
        self, output: Float[Tensor, "..."], x: Float[Tensor, "..."], t: Time, s: Time
    ) -> Float[Tensor, "..."]:
        """x_s from x_t and the network's output G(x_t, t, s): c_skip x_t + c_out G. Exactly x_t at s = t."""
        return _combine(self.c_skip(t, s), x, self.c_out(t, s), output)

    def target(self, x: Float[Tensor, "..."], noise: Float[Tensor, "..."], t: Time) -> Float[Tensor, "..."]:
        """What G would be for this pair alone: with it a jump from t lands on `add_noise(x, noise, s)` for every s."""
        one = torch.ones_like(_float64(t))
        if self.prediction == "identity":
            return _combine(one, x, 0 * one, noise)
        if self.prediction == "euler_fm":
            return _combine(-one / self.sigma_data, x, one / self.sigma_data, noise)
        norm = self.sigma_data * self._norm(t)
        return _combine(-self.sigma(t) / norm, x, self.alpha(t) / norm, noise)

    def _norm(self, t: Time) -> Tensor:
        alpha, sigma = self.alpha(t), self.sigma(t)
        return (alpha * alpha + sigma * sigma).sqrt()

    def _line(self, t: Time, s: Time) -> tuple[Tensor, Tensor]:
        """DDIM's shares of x_t and of x; (1, 0) at t = s = 0, where they are 0 / 0."""
        sigma_t = self.sigma(t)
        keep = torch.where(sigma_t > 0, self.sigma(s) / sigma_t, 1.0)
        return keep, torch.where(sigma_t > 0, self._turn(t, s) / sigma_t, 0.0)

    def _turn(self, t: Time, s: Time) -> Tensor:
        """alpha_s sigma_t - alpha_t sigma_s, without its cancellation at s near t."""
        gap = _float64(t) - _float64(s)
        return gap if self.schedule == "fm" else torch.sin(math.pi / 2 * gap)


def _float64(value: Time) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


def _combine(a: Tensor, x: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """a x + b y in the wider type of x and y, float32 at least; the coefficients are rounded to it once."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    return a.to(dtype) * x.to(dtype) + b.to(dtype) * y.to(dtype)
