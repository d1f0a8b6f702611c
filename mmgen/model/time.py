"""How state tokens learn their time t and their target time s. Context tokens have no time and never pass here."""

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmgen.model.precision import exact_products

TimeConditioning = Literal["add", "adaln_single", "adaln"]

NUM_FREQUENCIES = 128


def sinusoid(time: Float[Tensor, "I"], scale: float) -> Float[Tensor, "I F"]:
    """Cosines then sines of scale * time at 128 frequencies from 1 to 1/10000, computed in float64."""
    exponent = torch.arange(NUM_FREQUENCIES, dtype=torch.float64, device=time.device) / NUM_FREQUENCIES
    angles = scale * time.double()[:, None] * torch.exp(-math.log(10_000.0) * exponent)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """(t, s) -> one vector per instance, in float32 whatever the autocast: embeddings of t and of the stride t - s."""

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.time = self._mlp(width)
        self.stride = self._mlp(width)

    @staticmethod
    def _mlp(width: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(2 * NUM_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Float[Tensor, "I"], s: Float[Tensor, "I"]) -> Float[Tensor, "I W"]:
        with exact_products(t.device):
            dtype = next(self.parameters()).dtype
            strides = sinusoid(t.double() - s.double(), self.scale)
            return self.time(sinusoid(t, self.scale).to(dtype)) + self.stride(strides.to(dtype))


class Modulation(nn.Module):
    """adaLN-single (PixArt-alpha, arXiv 2310.00426): one projection for all blocks, an offset table for each.

    Or, `per_block`, adaLN (DiT, arXiv 2212.09748): a projection for each, which is 6 W^2 more weights a block.

    Gates and scales start at 1 and shifts at 0, so that a trunk that comes from a language model is, at the first
    step, that language model on state tokens too.
    """

    def __init__(self, width: int, num_blocks: int, norm: bool = False, per_block: bool = False) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6, elementwise_affine=False) if norm else nn.Identity()
        self.project = nn.Linear(width, 6 * width * (num_blocks if per_block else 1))
        # a projection of its own has an offset of its own
        self.tables = None if per_block else nn.Parameter(torch.zeros(num_blocks, 6, width))
        self.final = nn.Linear(width, 2 * width)
        for linear in (self.project, self.final):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self, embedding: Float[Tensor, "I W"]
    ) -> tuple[Float[Tensor, "N I 6 W"], Float[Tensor, "I 2 W"]]:
        """Shift, scale, gate of attention, then of the feed-forward, for every block; shift, scale of the head."""
        with exact_products(embedding.device):
            active = nn.functional.silu(embedding)
            blocks = self.project(active).unflatten(-1, (-1, 6, active.shape[-1])).transpose(0, 1)
            blocks = self.norm(blocks if self.tables is None else blocks + self.tables[:, None])
            final = self.norm(self.final(active).unflatten(-1, (2, -1)))
            # made on the device: a graph that is recorded there can hold no number of the host's
            neutral = (
                torch.arange(6, device=blocks.device).remainder(3).clamp(max=1).to(blocks.dtype)[:, None]
            )
            return blocks + neutral, final + neutral[:2]


def modulate(
    x: Float[Tensor, "B S W"], shift_scale: Float[Tensor, "I 2 W"], instance: Int[Tensor, "B S"]
) -> Float[Tensor, "B S W"]:
    """x scale + shift with each token's own instance."""
    shift, scale = (nn.functional.embedding(instance, each) for each in shift_scale.unbind(-2))
    return torch.addcmul(shift, x, scale)
