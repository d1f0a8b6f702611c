"""Which source the next document comes from."""

from collections.abc import Mapping
from typing import Literal

from mmgen.rng import draw_index, keyed_numpy

Weighting = Literal["documents", "tokens"]


class Mix:
    """Sources by weight, of documents or of tokens.

    By documents each is drawn by chance, keyed by the document's number. By tokens the next is of the source that lacks
    most of its share: weight * (tokens so far) - (its own), the first of the largest. The shares are then off by a
    document at most, whatever lengths the sources have.
    """

    def __init__(self, weights: Mapping[str, float], weighting: Weighting, seed: int) -> None:
        total = sum(weights.values())
        self.weights = {name: weight / total for name, weight in weights.items()}
        self.weighting: Weighting = weighting
        self.seed = seed
        self.tokens = dict.fromkeys(weights, 0)
        """that came of each source: the state"""

    @property
    def follows_lengths(self) -> bool:
        """Whether the lengths of documents decide the sources of those that follow."""
        return self.weighting == "tokens" and len(self.weights) > 1

    def next(self, number: int) -> str:
        """The source of document `number`."""
        names = list(self.weights)
        if len(names) == 1:
            return names[0]
        if self.weighting == "documents":
            draw = keyed_numpy(self.seed, "source", number)
            return names[draw_index(list(self.weights.values()), draw)]
        total = sum(self.tokens.values())
        return max(names, key=lambda name: self.weights[name] * total - self.tokens[name])

    def add(self, name: str, num_tokens: int) -> None:
        """Counts a document's tokens of both streams."""
        self.tokens[name] += num_tokens
