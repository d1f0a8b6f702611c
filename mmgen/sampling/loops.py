"""The loops of sampling, as free functions over callables: what the network is does not matter here."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from mmgen.model.joint import plain
from mmgen.objectives.path import Path

Output = Callable[[Tensor, float, float], Tensor]
"""(x_t, t, s) -> G(x_t, t, s | context)"""


Outputs = Callable[[Tensor, float, float, int], Sequence[Tensor]]
"""(x_t, t, s, n) -> G under each of the first n conditions; the first is the whole one"""


class Jump(Protocol):
    """(G, x_t, t, s) -> x_s, such as `Path.jump`."""

    def __call__(self, output: Tensor, x: Tensor, t: float, s: float, /) -> Tensor: ...


class AddNoise(Protocol):
    """(x, noise, t) -> x_t, such as `Path.add_noise`."""

    def __call__(self, x: Tensor, noise: Tensor, t: float, /) -> Tensor: ...


def uniform_grid(steps: int, t_min: float = 0.0, t_max: float = 1.0) -> list[float]:
    """steps + 1 times from t_max (noise) to t_min (data), evenly spaced."""
    return [t_max + i / steps * (t_min - t_max) for i in range(steps)] + [t_min]


def shifted(times: Sequence[float], shift: float) -> list[float]:
    """The times moved by t -> shift t / (1 + (shift - 1) t), which keeps 0 and 1 (arXiv 2403.03206, eq. 23).

    Above 1 the grid has more of its times near noise, below 1 near the data.
    """
    return [shift * t / (1 + (shift - 1) * t) for t in times]


def plan_times(steps: int, shift: float, time_range: tuple[float, float]) -> list[float]:
    """The steps + 1 times of a block: evenly spaced, `shifted`, and stretched over (t_min, t_max)."""
    t_min, t_max = time_range
    return [t_min + (t_max - t_min) * t for t in shifted(uniform_grid(steps), shift)]


def edm_grid(path: Path, steps: int, rho: float = 7.0) -> list[float]:
    """steps + 1 times over the path's range, evenly spaced in eta^(1 / rho) (EDM, arXiv 2206.00364, eq. 5).

    The last one is the path's own t_min: no further step to 0 is appended, unlike in EDM. Raises ValueError where the
    range ends at t = 1, of which eta is infinite.
    """
    if path.time_range[1] == 1:
        raise ValueError("t_max 1.0 has no finite eta: a grid in eta needs a path whose t_max is below 1")
    low, high = (float(path.eta(t)) ** (1 / rho) for t in path.time_range)
    middle = [(high + i / steps * (low - high)) ** rho for i in range(1, steps)]
    return through_grid(path, [float(path.eta_inverse(eta)) for eta in middle])


def through_grid(path: Path, times: Sequence[float]) -> list[float]:
    """The path's t_max, then `times`, then its t_min. For values of eta pass `path.eta_inverse` of each.

    Raises ValueError where the times do not fall from t_max to t_min.
    """
    t_min, t_max = path.time_range
    grid = [t_max, *times, t_min]
    if not all(t > s for t, s in pairwise(grid)):
        shown = ", ".join(f"{time:g}" for time in times)
        raise ValueError(f"times {shown}: they must fall, between {t_max:g} and {t_min:g}")
    return grid


def pushforward(output: Output, jump: Jump, x: Tensor, times: Sequence[float]) -> Tensor:
    """x moved along `times`, each jump from where the last one landed (IMM, arXiv 2503.07565, algorithm 2).

    x is noise of standard deviation sigma_data, of the precision in which the state shall be kept.
    """
    for t, s in pairwise(times):
        x = jump(output(x, t, s), x, t, s)
    return x


def heun(output: Output, jump: Jump, x: Tensor, times: Sequence[float]) -> Tensor:
    """`pushforward` with the mean of G at both ends of a step (Heun; EDM, arXiv 2206.00364, algorithm 1): two network
    calls a step. For outputs that are velocities, whatever target they are told.
    """
    for t, s in pairwise(times):
        start = output(x, t, s)
        end = output(jump(start, x, t, s), s, s)
        x = jump((start + end) / 2, x, t, s)
    return x


def restart(
    output: Output,
    jump: Jump,
    add_noise: AddNoise,
    x: Tensor,
    times: Sequence[float],
    noise: Callable[[int], Tensor],
) -> Tensor:
    """x jumped to the last of `times` from each other one, with fresh noise in between (IMM's restart sampling).

    `noise(i)` is that of after jump i, shaped as x and of standard deviation sigma_data; drawn from a generator of
    each request's own, it makes the result depend on nothing that the request was batched with.
    """
    end = times[-1]
    for i, t in enumerate(times[:-1]):
        if i > 0:
            x = add_noise(x, noise(i - 1), t)
        x = jump(output(x, t, end), x, t, end)
    return x


def one_by_one(*outputs: Output) -> Outputs:
    """Conditions each of which has a network call of its own."""
    return lambda x, t, s, num: [output(x, t, s) for output in outputs[:num]]


def guided(outputs: Outputs, guidance: float, between: tuple[float, float] = (0.0, 1.0)) -> Output:
    """G_null + w (G - G_null) (IMM, section 5), of the conditions whole and null; the second only where w is not 1.

    And only where t lies between two times, both included (arXiv 2404.07724); elsewhere it is G.
    """
    low, high = between

    def mixed(x: Tensor, t: float, s: float) -> Tensor:
        if guidance == 1 or not low <= t <= high:
            return outputs(x, t, s, 1)[0]
        full, null = outputs(x, t, s, 2)
        return null + guidance * (full - null)

    return mixed


def guided_apart(
    outputs: Outputs,
    guidance: float,
    picture_guidance: float,
    between: tuple[float, float] = (0.0, 1.0),
) -> Output:
    """G_null + v (G_pictures - G_null) + w (G - G_pictures), of the conditions whole, pictures and null: guidance by
    the pictures of a condition, v, and by what its texts add to them, w, apart (InstructPix2Pix, arXiv 2211.09800,
    eq. 3). v = w is `guided`.
    """
    low, high = between

    def mixed(x: Tensor, t: float, s: float) -> Tensor:
        if not low <= t <= high:
            return outputs(x, t, s, 1)[0]
        full, pictures, null = outputs(x, t, s, 3)
        return null + picture_guidance * (pictures - null) + guidance * (full - pictures)

    return mixed


def tempered(logits: Float[Tensor, "... V"], temperature: float, top_p: float) -> Float[Tensor, "... V"]:
    """Log-probabilities of softmax(logits / temperature) restricted to its top-p nucleus, in float32 at least.

    The nucleus is the fewest likeliest tokens whose probabilities reach top_p. Temperature 0 takes the likeliest one.
    """
    if temperature == 0:
        wide = torch.promote_types(logits.dtype, torch.float32)
        nothing = torch.full_like(logits, -torch.inf, dtype=wide)
        return nothing.scatter_(-1, logits.argmax(-1, keepdim=True), 0.0)
    log_probs = plain(logits / temperature)
    if top_p == 1:
        return log_probs
    probabilities, order = log_probs.exp().sort(descending=True, stable=True)
    reached = probabilities.cumsum(-1) >= top_p
    outside = torch.zeros_like(reached)
    outside[..., 1:] = reached[..., :-1]
    return plain(log_probs.masked_fill(torch.zeros_like(reached).scatter(-1, order, outside), -torch.inf))
