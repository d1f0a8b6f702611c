"""The path from data to noise, and the only interpreter of the network's output.

x_t = alpha(t) x + sigma(t) e, e ~ N(0, sigma_data^2), t in [0, 1], t = 0 data. Here the linear path of flow matching:
alpha = 1 - t, sigma = t. The network's output G means a velocity: sigma_data G -> e - x (`euler_fm` of IMM,
arXiv 2503.07565, section 5), so that a jump from t to s is x + (s - t) sigma_data G.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Path:
    sigma_data: float = 0.5

    def add_noise(
        self, x: Float[Tensor, "..."], noise: Float[Tensor, "..."], t: Float[Tensor, "..."]
    ) -> Float[Tensor, "..."]:
        """x_t. `noise` has standard deviation sigma_data; t broadcasts."""
        return (1 - t) * x + t * noise

    def velocity(self, x: Float[Tensor, "..."], noise: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """What G would be for this pair alone: (e - x) / sigma_data."""
        return (noise - x) / self.sigma_data

    def jump(
        self,
        output: Float[Tensor, "..."],
        x: Float[Tensor, "..."],
        t: Float[Tensor, "..."] | float,
        s: Float[Tensor, "..."] | float,
    ) -> Float[Tensor, "..."]:
        """x_s from x_t and the network's output G(x_t, t, s)."""
        return x + (s - t) * self.sigma_data * output
