"""Distances between two sets of pictures, in features: KID (the headline) and the Frechet distance.

Works on feature matrices and knows neither networks nor files. A set of generated pictures is often drawn for
the very prompts whose real pictures it is compared with. Then row i of both belongs to prompt i, and the usual
formulas, which take the sets to be independent, would reward copying: so `kid(paired=True)` leaves the pairs
(i, i) out, and `frechet` compares generated pictures of one half of the prompts with real ones of the other
half. A perfect copier scores the real-against-real floor, not less.

Shape letters: N generated, M real, F features, D bootstrap draws.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from mmgen.evaluation.intervals import Estimate, Key, Statistic, bootstrap, spread
from mmgen.rng import keyed_torch

SPLITS = 20  # random halvings


def polynomial_kernel(x: Float[Tensor, "N F"], y: Float[Tensor, "M F"]) -> Float[Tensor, "N M"]:
    """k(x, y) = (x.y / F + 1)^3, the kernel of KID (Binkowski et al. 2018, arXiv 1801.01401, section 4), float64."""
    x, y = x.double(), y.double()
    return (x @ y.T / x.shape[1] + 1) ** 3


def kid_statistic(x: Float[Tensor, "N F"], y: Float[Tensor, "M F"], paired: bool = False) -> Statistic:
    """Unbiased squared MMD under the polynomial kernel as a statistic for `bootstrap`: a function of the counts
    of x and of y or, where `paired` (N = M, row i of both belongs to item i), of one matrix of counts. A
    U-statistic: the whole sets, no subsets (Gretton et al. 2012, equation 3; paired: equation 4). An item drawn
    twice is never compared with itself, so that resampling adds no bias."""
    _check(x, y, least=2)
    if paired:
        assert len(x) == len(y), "paired sets have one generated and one real picture per item"
        h = _pairs(x, y)
        return lambda w: _off_diagonal_mean(h, w)
    kxx, kyy, kxy = polynomial_kernel(x, x), polynomial_kernel(y, y), polynomial_kernel(x, y)

    def statistic(u: Float[Tensor, "D N"], v: Float[Tensor, "D M"]) -> Float[Tensor, " D"]:
        cross = ((u @ kxy) * v).sum(1) / (u.sum(1) * v.sum(1))
        return _off_diagonal_mean(kxx, u) + _off_diagonal_mean(kyy, v) - 2 * cross

    return statistic


def _pairs(x: Float[Tensor, "N F"], y: Float[Tensor, "N F"]) -> Float[Tensor, "N N"]:
    """Of two items with a generated and a real picture each what a paired KID averages (Gretton et al. 2012, eq. 4)."""
    cross = polynomial_kernel(x, y)
    return polynomial_kernel(x, x) + polynomial_kernel(y, y) - cross - cross.T


def _off_diagonal_mean(h: Float[Tensor, "N N"], w: Float[Tensor, "D N"]) -> Float[Tensor, " D"]:
    pairs = w.sum(1) ** 2 - (w**2).sum(1)
    return (((w @ h) * w).sum(1) - w**2 @ h.diagonal()) / pairs


def kid(x: Float[Tensor, "N F"], y: Float[Tensor, "M F"], key: Key, paired: bool = False) -> Estimate:
    """KID of two sets (0 in expectation when they come from one law, and then often slightly below it) with its
    bootstrap interval. `paired`: row i of both belongs to prompt i."""
    sizes = [len(x)] if paired else [len(x), len(y)]
    return bootstrap(kid_statistic(x, y, paired), sizes, key)


def kid_difference(
    x: Float[Tensor, "N F"], other: Float[Tensor, "N F"], y: Float[Tensor, "N F"], key: Key
) -> Estimate:
    """KID of x less that of `other`, both drawn for the N prompts of y, with a bootstrap over prompts: what a prompt
    does to both of them cancels, so the interval is narrower than those of the two distances say."""
    assert len(x) == len(other) == len(y), "sets of the same prompts"
    h = _pairs(x, y) - _pairs(other, y)
    return bootstrap(lambda w: _off_diagonal_mean(h, w), [len(y)], key)


def frechet_distance(x: Float[Tensor, "N F"], y: Float[Tensor, "M F"]) -> float:
    """Squared Frechet distance of the Gaussians fitted to two sets, float64 (Heusel et al. 2017, arXiv 1706.08500).

    |mu_x - mu_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2)). With S_x = A A^T and S_y = B B^T the last trace is the
    sum of the singular values of A^T B, which is exact and finite for singular covariances, where a matrix
    square root is not.
    """
    _check(x, y, least=2)
    mean_x, a = _covariance_factor(x)
    mean_y, b = _covariance_factor(y)
    traces = a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum()
    # Rounding can leave equal sets a hair below zero.
    return max(0.0, ((mean_x - mean_y).square().sum() + traces).item())


def _covariance_factor(x: Float[Tensor, "N F"]) -> tuple[Float[Tensor, " F"], Float[Tensor, "R F"]]:
    """Mean, and A^T with A A^T = the unbiased covariance, in at most F rows."""
    x = x.double()
    mean = x.mean(0)
    centred = (x - mean) / (len(x) - 1) ** 0.5
    return mean, torch.linalg.qr(centred, mode="r").R if len(x) > x.shape[1] else centred


def frechet_statistic(x: Float[Tensor, "N F"], y: Float[Tensor, "M F"]) -> Statistic:
    """`frechet_distance` as a statistic for `bootstrap`: a function of the counts of x and of y. Of few features: each
    draw takes an eigendecomposition of F x F."""
    _check(x, y, least=2)
    x, y = x.double(), y.double()

    def statistic(u: Float[Tensor, "D N"], v: Float[Tensor, "D M"]) -> Float[Tensor, " D"]:
        return torch.stack([distance(a, b) for a, b in zip(u, v, strict=True)])

    def distance(a: Float[Tensor, " N"], b: Float[Tensor, " M"]) -> Float[Tensor, ""]:
        (mean_x, cov_x), (mean_y, cov_y) = _moments(x, a), _moments(y, b)
        values, vectors = torch.linalg.eigh(cov_x)
        root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
        cross = torch.linalg.eigvalsh(root @ cov_y @ root).clamp_min(0).sqrt().sum()
        return (mean_x - mean_y).square().sum() + cov_x.trace() + cov_y.trace() - 2 * cross

    return statistic


def _moments(
    x: Float[Tensor, "N F"], counts: Float[Tensor, " N"]
) -> tuple[Float[Tensor, " F"], Float[Tensor, "F F"]]:
    total = counts.sum()
    mean = counts @ x / total
    centred = x - mean
    return mean, (centred * counts[:, None]).T @ centred / (total - 1)


def frechet(x: Float[Tensor, "N F"], y: Float[Tensor, "N F"], key: Key) -> Estimate:
    """Frechet distance of generated (x) and real (y) pictures of the same N prompts: mean and spread over
    random halvings of x of one half against y of the other (N // 2 pictures each). Compare it with `real_floor`
    of y and nothing else: the distance is biased upwards by an amount that depends on the number of
    pictures."""
    assert len(x) == len(y), "one generated and one real picture per prompt"
    return _over_halves(lambda one, two: frechet_distance(x[one], y[two]), len(x), key)


def real_floor(metric: Callable[[Tensor, Tensor], float], real: Float[Tensor, "N F"], key: Key) -> Estimate:
    """What `metric` says of two random halves of the real pictures: mean and spread over random halvings. No
    generator can be told from the real pictures below it. With `frechet`'s key the halves are those of
    `frechet`."""
    return _over_halves(lambda one, two: metric(real[one], real[two]), len(real), key)


def _over_halves(metric: Callable[[Tensor, Tensor], float], num: int, key: Key) -> Estimate:
    if num < 4:
        raise ValueError(f"{num} pictures cannot be halved; a distance and its floor need at least 4")
    half, values = num // 2, []
    for split in range(SPLITS):
        order = torch.randperm(num, generator=keyed_torch("halves", split, *key))
        values.append(metric(order[:half], order[half : 2 * half]))
    return spread(values, half)


def kid_value(x: Float[Tensor, "N F"], y: Float[Tensor, "M F"]) -> float:
    """KID without an interval, for `real_floor`."""
    ones = (torch.ones(1, len(x), dtype=torch.float64), torch.ones(1, len(y), dtype=torch.float64))
    return kid_statistic(x, y)(*ones).item()


def _check(x: Tensor, y: Tensor, least: int) -> None:
    if min(len(x), len(y)) < least:
        raise ValueError(
            f"a distance needs at least {least} pictures on each side, not {len(x)} and {len(y)}"
        )
    for features in (x, y):
        if not torch.isfinite(features).all():
            raise ValueError("features are not finite: a picture holds NaN or infinity")
