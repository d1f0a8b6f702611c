"""Rotary positions with three interleaved axes: (sequence, row, column).

Text carries the same number on every axis, so that on text this is the one-axis embedding of Qwen3, value for value.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

NUM_AXES = 3


def rope_angles(
    positions: Int[Tensor, "B L 3"], head_dim: int, theta: float
) -> tuple[Float[Tensor, "B L 1 E/2"], Float[Tensor, "B L 1 E/2"]]:
    """Cosines and sines for heads of `head_dim`, in float32. Frequency j turns with axis j mod 3."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    frequency = 1.0 / theta**exponent
    axis = torch.arange(head_dim // 2, device=positions.device) % NUM_AXES
    angles = positions[..., axis].float() * frequency
    angles = angles.unsqueeze(-2)
    return angles.cos(), angles.sin()


def rotate(x: Float[Tensor, "B L H E"], cos: Tensor, sin: Tensor) -> Float[Tensor, "B L H E"]:
    """x turned by the angles; halves are paired (j with j + E/2), as in Qwen3."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    turned = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)
    return torch.cat(turned, dim=-1)
