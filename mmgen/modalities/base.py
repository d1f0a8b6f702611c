"""What a modality is: how a sample becomes spans, and how its tokens enter and leave the trunk."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmgen.sequence import Sample, Span
from mmgen.tokenization.text import TextTokenizer


class MissingPart(ValueError):
    """A sample lacks what a task asks of it; `reason` is what it is counted under."""

    def __init__(self, reason: str, key: str) -> None:
        super().__init__(f"{reason}: {key}")
        self.reason = reason


@dataclass(frozen=True)
class Place:
    """Where in its document a part stands: the first position free, and whether parts come before and after it.

    `level` is the level of detail that the task asks of a caption, None for one drawn by weight. `after_text`: the
    part before it is a text.
    """

    start: int
    first: bool
    last: bool
    level: str | None = None
    after_text: bool = False


class LinearEmbedding(nn.Linear):
    """Values by one linear map; positions are left to the trunk's rotary embedding."""

    def forward(
        self, values: Float[Tensor, "... D"], positions: Int[Tensor, "... 3"]
    ) -> Float[Tensor, "... W"]:
        return super().forward(values)


class Modality(ABC):
    """One kind of content. Subclasses define a frozen dataclass `Config` and, when continuous, `channels`.

    A continuous modality's values have standard deviation `sigma_data`; so has the noise they are mixed with.
    """

    Config: ClassVar[type]
    channels: int = 0
    """values per token; 0 for a discrete modality"""
    sigma_data: float = 0.5
    """one for all objectives (IMM, arXiv 2503.07565)"""

    def __init__(self, name: str, config: Any, tokenizer: TextTokenizer) -> None:
        self.name = name
        self.config = config
        self.tokenizer = tokenizer

    @classmethod
    def outline(cls, name: str, config: Any, tokenizer: TextTokenizer) -> "Modality":
        """One of which only sizes are asked. Whoever opens files when it is made may leave them closed here."""
        return cls(name, config, tokenizer)

    @property
    def loss_weight(self) -> float:
        return self.config.loss_weight

    @property
    def copies(self) -> int:
        """Noisy copies of each block that is trained on; they share one context."""
        return 1

    @abstractmethod
    def encode(self, sample: Sample, place: Place, draw: np.random.Generator) -> list[Span]:
        """The spans of the sample's part of this modality. Raises MissingPart where the sample has none."""

    def build_embedding(self, width: int) -> nn.Module:
        """(values [..., channels], positions [..., 3]) -> [..., width], for clean and noisy tokens alike."""
        return LinearEmbedding(self.channels, width)

    def build_head(self, width: int) -> nn.Module:
        """[..., width] -> [..., channels]: the network's raw output G. Starts at zero."""
        head = nn.Linear(width, self.channels)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        return head

    def draw_time(self, draw: np.random.Generator) -> float:
        """A training time in [0, 1]: 0 is data, 1 is noise."""
        return float(draw.random())

    def commit(self, values: Float[Tensor, "N D"], draw: np.random.Generator) -> Float[Tensor, "N D"]:
        """The values as the context carries them, in training and in sampling alike."""
        return values


@lru_cache(maxsize=4096)
def text_positions(start: int, length: int) -> Int[np.ndarray, "N 3"]:
    """[length, 3]: text carries the same number on every axis. The array is read-only, as others share it."""
    positions = np.arange(start, start + length)[:, None].repeat(3, axis=1)
    positions.setflags(write=False)
    return positions
