"""Flow matching (arXiv 2210.02747, 2209.03003): the many-step baseline, in the two-time network with s = t."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float
from torch import Tensor

from mmgen.objectives.base import Objective, Times
from mmgen.objectives.path import Path


@dataclass(frozen=True)
class FlowMatchingConfig:
    name: Literal["flow_matching"] = "flow_matching"


class FlowMatching(Objective):
    """E |G - (e - x) / sigma_data|^2: a velocity is the jump's limit at s = t, so the network is told s = t."""

    def __init__(self, config: FlowMatchingConfig) -> None:
        # a velocity has a meaning up to pure noise, so nothing of [0, 1] is left out
        super().__init__(Path(t_max=1.0))

    def draw_times(
        self,
        draw_time: Callable[[np.random.Generator], float],
        draw: np.random.Generator,
        fraction: float = 0.0,
    ) -> Times:
        t = draw_time(draw)
        return Times(t, t, t)

    def told_target(self, t: Tensor, s: Tensor) -> Tensor:
        return t

    def token_loss(
        self, output: Float[Tensor, "B S D"], x: Float[Tensor, "B S D"], noise: Float[Tensor, "B S D"]
    ) -> Float[Tensor, "B S"]:
        velocity = self.path.target(x, noise, t=0.0)  # the same at every t
        return (output.float() - velocity.float()).square().mean(-1)
