"""A measured number with its 95 % interval, and the ways to get one. Knows nothing of what is measured.

Bootstraps resample by weights: draw b is a row of counts that sums to n. A statistic that takes the matrix of
counts is evaluated for all draws in a few matrix products, and two statistics given the same counts are
compared on the same resampled prompts (a paired bootstrap): `bootstrap(lambda w: kid_a(w) - kid_b(w), [n],
key)`.

Shape letters: D draws, N items.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mmgen.rng import keyed_numpy

Key = tuple[int | str, ...]
Statistic = Callable[..., Float[Tensor, " D"]]

DRAWS = 1000
_Z95 = 1.959963984540054


@dataclass(frozen=True)
class Estimate:
    """A value, its 95 % interval and the number of items it rests on."""

    value: float
    low: float
    high: float
    num: int

    def __format__(self, spec: str) -> str:
        spec = spec or ".3f"
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def bootstrap(statistic: Statistic, sizes: Sequence[int], key: Key, draws: int = DRAWS) -> Estimate:
    """Percentile bootstrap (Efron 1979) of `statistic`, which takes one matrix of counts [D, n] for each of `sizes`
    (independent samples; items that belong together, such as two models' pictures of one prompt, share one) and
    returns D values. The value is the statistic at counts of one."""
    rng = keyed_numpy("bootstrap", *key)
    counts = [torch.from_numpy(rng.multinomial(n, [1 / n] * n, size=draws)).double() for n in sizes]
    value = statistic(*(torch.ones(1, n, dtype=torch.float64) for n in sizes)).item()
    # A statistic of pairs does not exist for the rare draw of few items that has one item only: nan, left out.
    drawn = torch.nanquantile(statistic(*counts), torch.tensor([0.025, 0.975], dtype=torch.float64))
    low, high = drawn.tolist()
    return Estimate(value, low, high, min(sizes))


def mean(values: Float[Tensor, " N"], key: Key) -> Estimate:
    """The mean over items with its bootstrap interval."""
    if len(values) == 0:
        raise ValueError("a mean needs at least one item")
    x = values.double()
    return bootstrap(lambda w: (w @ x) / w.sum(1), [len(x)], key)


def ratio(numerator: Float[Tensor, " N"], denominator: Float[Tensor, " N"], key: Key) -> Estimate:
    """Ratio of sums over items with its bootstrap interval."""
    a, b = numerator.double(), denominator.double()
    return bootstrap(lambda w: (w @ a) / (w @ b), [len(a)], key)


def proportion(hits: Sequence[bool] | Tensor) -> Estimate:
    """The share of hits with Wilson's score interval (1927), which stays honest at 0 and at 1."""
    n = len(hits)
    if n == 0:
        raise ValueError("a share needs at least one item")
    p = float(sum(bool(hit) for hit in hits)) / n
    centre = (p + _Z95**2 / (2 * n)) / (1 + _Z95**2 / n)
    half = _Z95 / (1 + _Z95**2 / n) * math.sqrt(p * (1 - p) / n + _Z95**2 / (4 * n * n))
    return Estimate(p, min(max(0.0, centre - half), p), max(min(1.0, centre + half), p), n)


def spread(values: Sequence[float], num: int) -> Estimate:
    """The mean of repeats with the range that holds 95 % of them."""
    x = torch.tensor(values, dtype=torch.float64)
    low, high = torch.quantile(x, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(x.mean().item(), low, high, num)
