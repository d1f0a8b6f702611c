"""What an objective is: which times it trains at, what the network is told of them, and the loss of its output."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import Tensor

from mmgen.objectives.path import Path


@dataclass(frozen=True)
class Times:
    """The times of one group, 0 <= s <= t <= 1."""

    t: float
    s: float


class Objective(ABC):
    """Losses are sums over tokens, each token's a mean over channels; who calls divides by the global token count."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def draw_times(
        self, draw_time: Callable[[np.random.Generator], float], draw: np.random.Generator
    ) -> Times:
        """The times of a group; `draw_time` is the modality's own distribution of t."""

    @abstractmethod
    def told_target(self, t: Tensor, s: Tensor) -> Tensor:
        """The target time that the network is given for a jump from t to s."""

    @abstractmethod
    def token_loss(
        self, output: Float[Tensor, "B S D"], x: Float[Tensor, "B S D"], noise: Float[Tensor, "B S D"]
    ) -> Float[Tensor, "B S"]:
        """The loss of each token, in float32."""
