"""Are generated pictures copies of training pictures? Nearest-neighbour distances against those of held-out pictures.

Works on feature or pixel matrices; knows neither models nor files.

Shape letters: N generated, T training, M held out, F features.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mmgen.evaluation.intervals import Estimate, proportion

QUANTILE = 0.05
MIN_HELD_OUT = 20  # fewer have no 5 % quantile


@dataclass(frozen=True)
class Memorization:
    """How near generated pictures lie to training pictures.

    `share` of them lie nearer than `threshold`, the 5 % quantile of held-out pictures' own distances to
    training: 0.05 is expected of new pictures, 1 of copies. `ratio` is the median distance over held-out
    pictures' median: 1 and 0."""

    share: Estimate
    threshold: float
    ratio: float


def nearest_distances(x: Float[Tensor, "N F"], training: Float[Tensor, "T F"]) -> Float[Tensor, " N"]:
    """Distance from each row to the nearest training row: the root mean square over the F entries."""
    parts = [torch.cdist(part.double(), training.double()).amin(1) for part in x.split(1024)]
    return torch.cat(parts) / x.shape[1] ** 0.5


def memorization(
    generated: Float[Tensor, "N F"], training: Float[Tensor, "T F"], held_out: Float[Tensor, "M F"]
) -> Memorization:
    """Compare generated with held-out pictures by their distances to the training pictures. The share's
    interval is over generated pictures, given the threshold. Raises ValueError below 20 held-out pictures: no 5
    % quantile exists."""
    if len(held_out) < MIN_HELD_OUT:
        raise ValueError(
            f"{len(held_out)} held-out pictures give no 5 % quantile; memorization needs at least 20"
        )
    reference = nearest_distances(held_out, training)
    distances = nearest_distances(generated, training)
    threshold = torch.quantile(reference, QUANTILE)
    # Held-out pictures that equal a training picture put the threshold at 0, where a copy must still count.
    share = proportion(distances <= threshold)
    return Memorization(
        share, threshold.item(), (distances.median() / reference.median().clamp_min(1e-12)).item()
    )
