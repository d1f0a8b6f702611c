"""Text: captions and plain text as token ids, each token a block of its own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from mmgen.modalities.base import MissingPart, Modality, Place, text_positions
from mmgen.rng import draw_index
from mmgen.sequence import Sample, Span


@dataclass(frozen=True)
class TextConfig:
    captions: Mapping[str, float] = field(default_factory=lambda: {"text": 1.0})
    """how often each level of detail of a caption is drawn, among those that a sample has"""
    loss_weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.captions or min(self.captions.values()) < 0 or sum(self.captions.values()) <= 0:
            raise ValueError(f"captions {dict(self.captions)} must be weights >= 0 that do not sum to 0")


class Text(Modality):
    Config = TextConfig

    def encode(self, sample: Sample, place: Place, draw: np.random.Generator) -> list[Span]:
        ids = self.tokenizer.encode(self.choose_caption(sample, draw, place.level))
        if place.after_text:
            ids = [*self.separator(), *ids]
        if place.last:
            ids = [*ids, self.tokenizer.end]
        return [self.span(ids, place.start)]

    def separator(self) -> list[int]:
        """What stands between two texts that follow each other: a new line."""
        return self.tokenizer.encode("\n")

    def choose_caption(self, sample: Sample, draw: np.random.Generator, level: str | None = None) -> str:
        """The sample's caption of this level of detail, or at one drawn by the configured weights."""
        if level is not None:
            if not sample.captions.get(level):
                raise MissingPart(f"missing caption {level}", sample.key)
            return sample.captions[level]
        levels = [
            level
            for level, weight in self.config.captions.items()
            if weight > 0 and sample.captions.get(level)
        ]
        if not levels:
            raise MissingPart("missing caption", sample.key)
        weights = [self.config.captions[level] for level in levels]
        return sample.captions[levels[draw_index(weights, draw)]]

    def begin(self) -> Span:
        """The token that begins every document; nothing predicts it."""
        return self._begin

    @cached_property
    def _begin(self) -> Span:
        return self.span([self.tokenizer.begin], 0, predicted=False)

    def span(self, ids: Sequence[int], start: int, predicted: bool = True) -> Span:
        return Span(
            self.name,
            text_positions(start, len(ids)),
            np.array(ids, dtype=np.int64),
            predicted=predicted,
        )
