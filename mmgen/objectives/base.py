"""What an objective is: which times it trains at, what the network is told of them, and the loss of its output."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from mmgen.objectives.path import Path
from mmgen.sequence import UNGROUPED, Grouping


@dataclass(frozen=True)
class Times:
    """The times of one group, 0 <= s <= r <= t <= 1: jumps go from t to s, and the target pass from r to s."""

    t: float
    s: float
    r: float


class Objective(ABC):
    """One of two kinds. Without `needs_target` the loss is `token_loss`, of each token by itself. With it, instances
    come in groups of `particles` that share (t, s, r), a second pass at (x_r, r, s) makes no gradient, and the loss
    is `group_loss`. Either way who calls sums over tokens and divides by their global count.
    """

    needs_target: bool = False
    anchored: bool = False
    """whether `group_loss` asks for the velocity"""

    def __init__(self, path: Path, grouping: Grouping = UNGROUPED) -> None:
        self.path = path
        self.grouping = grouping

    @property
    def particles(self) -> int:
        return self.grouping.particles

    @abstractmethod
    def draw_times(
        self,
        draw_time: Callable[[np.random.Generator], float],
        draw: np.random.Generator,
        fraction: float = 0.0,
    ) -> Times:
        """The times of a group; `draw_time` is the modality's own distribution of t on [0, 1].

        `fraction` of the training is done: 0 at its first step, 1 at its end.
        """

    @abstractmethod
    def told_target(self, t: Tensor, s: Tensor) -> Tensor:
        """The target time that the network is given for a jump from t to s."""

    def token_loss(
        self, output: Float[Tensor, "B S D"], x: Float[Tensor, "B S D"], noise: Float[Tensor, "B S D"]
    ) -> Float[Tensor, "B S"]:
        """The loss of each token, a mean over its channels, in float32."""
        raise NotImplementedError(f"the loss of {type(self).__name__} is `group_loss`")

    def group_loss(
        self,
        student: Float[Tensor, "G M D"],
        target: Float[Tensor, "G M D"],
        x_t: Float[Tensor, "G M D"],
        x_r: Float[Tensor, "G M D"],
        t: Float[Tensor, "G"],
        s: Float[Tensor, "G"],
        r: Float[Tensor, "G"],
        velocity: Float[Tensor, "G M D"] | None = None,
        same_context: Bool[Tensor, "G M M"] | None = None,
    ) -> Float[Tensor, "G"]:
        """The loss per token of each group, in float32 at least; every token of its M blocks bears it.

        `student` is G(x_t, t, s), `target` is G(x_r, r, s); D are all numbers of one block, its tokens' flattened.
        `velocity` is what G stands for in each pair of data and noise (`Path.target`), `same_context` which particles
        read the same.
        """
        raise NotImplementedError(f"the loss of {type(self).__name__} is `token_loss`")
