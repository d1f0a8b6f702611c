"""Random changes of pictures that keep them pictures, so that an autoencoder reconstructs what it never saw.

Half of the pictures are only mirrored: the others are also moved, scaled, turned and recoloured. Shape letters: B
pictures, H W pixels.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def augment(pixels: Float[Tensor, "B 3 H W"], generator: torch.Generator) -> Float[Tensor, "B 3 H W"]:
    """`pixels` in [-1, 1], changed; what comes in from beyond an edge is white. Draws from `generator` alone."""
    num = len(pixels)
    changed = torch.rand(num, generator=generator) < 0.5
    mirrored = torch.rand(num, generator=generator) < 0.5
    pixels = torch.where(mirrored.view(-1, 1, 1, 1), pixels.flip(-1), pixels)
    other = _recolour(_move(pixels, generator), generator)
    return torch.where(changed.view(-1, 1, 1, 1), other, pixels)


def _move(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Turned by a multiple of 90 degrees, scaled by 0.7 to 1.4, shifted by up to a tenth of the side."""
    num = len(pixels)
    quarter = torch.randint(4, (num,), generator=generator) * (math.pi / 2)
    scale = torch.exp((torch.rand(num, generator=generator) * 2 - 1) * math.log(1.4))
    shift = (torch.rand(num, 2, generator=generator) * 2 - 1) * 0.2  # the grid's sides are 2 long
    turn = torch.stack([quarter.cos(), -quarter.sin(), quarter.sin(), quarter.cos()], dim=1).view(-1, 2, 2)
    affine = torch.cat([turn / scale.view(-1, 1, 1), shift.unsqueeze(-1)], dim=2)
    grid = F.affine_grid(affine, list(pixels.shape), align_corners=False)
    # Outside of the picture grid_sample gives 0, so white has to be 0 meanwhile.
    return F.grid_sample(pixels - 1, grid, align_corners=False) + 1


def _recolour(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Colour channels in another order, each with a gamma of its own; white and black stay what they are."""
    num = len(pixels)
    order = torch.rand(num, 3, generator=generator).argsort(dim=1)
    gamma = torch.exp((torch.rand(num, 3, 1, 1, generator=generator) * 2 - 1) * math.log(1.6))
    shuffled = pixels.gather(1, order.view(-1, 3, 1, 1).expand_as(pixels))
    return ((shuffled + 1) / 2).clamp(0, 1).pow(gamma) * 2 - 1
