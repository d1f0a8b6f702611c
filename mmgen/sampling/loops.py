"""The loops of sampling, as free functions over callables: what the network is does not matter here."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Output = Callable[[Tensor, float, float], Tensor]
"""(x_t, t, s) -> G(x_t, t, s | context)"""


class Jump(Protocol):
    """(G, x_t, t, s) -> x_s, such as `Path.jump`."""

    def __call__(self, output: Tensor, x: Tensor, t: float, s: float, /) -> Tensor: ...


def uniform_grid(steps: int) -> list[float]:
    """steps + 1 times from 1 (noise) to 0 (data), evenly spaced."""
    return [1 - i / steps for i in range(steps + 1)]


def pushforward(output: Output, jump: Jump, x: Tensor, times: Sequence[float]) -> Tensor:
    """x moved along `times`, each jump from where the last one landed (IMM, arXiv 2503.07565, algorithm 2)."""
    for t, s in pairwise(times):
        x = jump(output(x, t, s), x, t, s)
    return x


def guided(output: Output, null: Output, guidance: float) -> Output:
    """G_null + w (G - G_null) (IMM, section 5): two network calls where w is not 1."""
    if guidance == 1:
        return output

    def mixed(x: Tensor, t: float, s: float) -> Tensor:
        base = null(x, t, s)
        return base + guidance * (output(x, t, s) - base)

    return mixed


def draw_token(
    logits: Float[Tensor, "V"], temperature: float, top_p: float, draw: np.random.Generator
) -> int:
    """A token from softmax(logits / temperature) restricted to its top-p nucleus, by inversion of one uniform draw."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities, order = (logits.double() / temperature).softmax(-1).sort(descending=True, stable=True)
    cumulative = probabilities.cumsum(-1)
    # the nucleus is the shortest prefix that reaches top_p
    size = int((cumulative < top_p).sum()) + 1
    target = draw.random() * cumulative[:size][-1]
    rank = int(torch.searchsorted(cumulative[:size], target, right=True))
    return int(order[min(rank, size - 1)])
