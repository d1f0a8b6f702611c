"""Joint heads: a normalized law q(x_1..x_k | h) of the next k tokens, given the trunk's final hidden state h.

k independent softmaxes assume a factorization that text does not have, and no training mends it (arXiv 2503.07154).
The heads here are one baseline that does assume it and three that do not; all have the same interface. They own no
vocabulary matrix: what embeds and unembeds tokens is lent to them.

The law is of all k tokens. While drafting, x_1 is drawn from the trunk's own logits, and the head is told of it as of
any other token (`Draft.extend`): what it says itself of x_1 weighs that evidence and is never drawn from.

Shape letters: N rows (one hidden state each), k tokens of a window, W width, V vocabulary, R components, D draws.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmgen.model.vocabulary import Vocabulary
from mmgen.sequence import NO_LABEL

Law = Callable[[Float[Tensor, "... V"]], Float[Tensor, "... V"]]
"""logits -> log-probabilities; sampling gives one with temperature and top-p"""


JointKind = Literal["independent", "mixture", "hmm", "chain"]


@dataclass(frozen=True)
class JointConfig:
    """`independent`: k softmaxes of their own, the baseline. `mixture`: a latent picks one of R such products (a CP
    decomposition). `hmm`: the latent is a chain. `chain`: one layer applied k - 1 times, an exact chain rule.
    """

    kind: JointKind
    tokens: int = 4
    """k, the first one included, which the trunk predicts too"""
    components: int = 8
    """R, of mixture and hmm"""
    rank: int = 64
    """of the map from h to a component's hidden state, for all kinds but chain"""
    weight: float = 0.2
    """of the loss, beside the text loss"""
    share: float = 0.25
    """of the positions of a batch that the head is trained at: each costs k R softmaxes over the vocabulary"""
    balance: float = 0.01
    """of the term that keeps the components in use, of mixture and hmm"""

    def __post_init__(self) -> None:
        if self.tokens < 2:
            raise ValueError(f"tokens {self.tokens} must be at least 2: the trunk itself predicts one")
        if self.components < 2:
            raise ValueError(
                f"components {self.components} must be at least 2; one component is kind independent"
            )
        if self.rank < 1:
            raise ValueError(f"rank {self.rank} must be at least 1")
        if not self.weight > 0:
            raise ValueError(f"weight {self.weight} must be positive; without it the head is not trained")
        if not 0 < self.share <= 1:
            raise ValueError(f"share {self.share} must be in (0, 1]; 1 trains at every position")
        if self.balance < 0:
            raise ValueError(f"balance {self.balance} must be at least 0 (0 is none)")


def plain(logits: Float[Tensor, "... V"]) -> Float[Tensor, "... V"]:
    """Log-probabilities of softmax(logits), in float32 at least."""
    return _wide(logits).log_softmax(-1)


def invert(probabilities: Float[Tensor, "... V"], uniform: Float[Tensor, "..."]) -> Int[Tensor, "..."]:
    """The index that each `uniform` in [0, 1) falls on; probabilities need not sum to 1, and none of 0 is taken."""
    cumulative = probabilities.double().cumsum(-1)
    target = uniform.double() * cumulative[..., -1]
    return torch.searchsorted(cumulative, target[..., None], right=True).squeeze(-1)


def label_windows(labels: Int[Tensor, "B C"], num_tokens: int) -> Int[Tensor, "B C k"]:
    """The next `num_tokens` tokens after each position, from the labels of a batch (`PackedBatch.labels`).

    NO_LABEL from the first token on that is not to be predicted: a window ends with its text.
    """
    padded = F.pad(labels, (0, num_tokens - 1), value=NO_LABEL)
    windows = padded.unfold(-1, num_tokens, 1)
    inside = (windows != NO_LABEL).long().cumprod(-1).bool()
    return windows.where(inside, NO_LABEL)


@dataclass(frozen=True)
class Drawn:
    """Drafted tokens, and the exact conditional (float64, sums to 1) that each was drawn from."""

    tokens: Int[Tensor, "N D"]
    probabilities: Float[Tensor, "N D V"]


class Draft(ABC):
    """A head after some of the k tokens of each row. Nothing here changes: `extend` returns another."""

    @abstractmethod
    def log_conditional(self) -> Float[Tensor, "N V"]:
        """log q(x_i | h, x_1..x_(i-1)) of the next token, exact and normalized."""

    @abstractmethod
    def extend(self, tokens: Int[Tensor, "N"]) -> "Draft":
        """The draft with one more token a row, which needs not have been drawn from it."""

    def draw(self, uniform: Float[Tensor, "N D"]) -> Drawn:
        """The next D (at least 1) tokens, each by inversion of its number in [0, 1)."""
        draft, tokens, laws = self, [], []
        for number in uniform.unbind(-1):
            if tokens:
                draft = draft.extend(tokens[-1])
            laws.append(draft.log_conditional().double().softmax(-1))
            tokens.append(invert(laws[-1], number))
        return Drawn(torch.stack(tokens, 1), torch.stack(laws, 1))


class JointHead(nn.Module, ABC):
    """A law of the next `num_tokens` tokens given h."""

    def __init__(self, config: JointConfig) -> None:
        super().__init__()
        self.config = config
        self.num_tokens = config.tokens

    @abstractmethod
    def log_prob(
        self, hidden: Float[Tensor, "N W"], tokens: Int[Tensor, "N k"], vocabulary: Vocabulary
    ) -> Float[Tensor, "N"]:
        """log q(x_1..x_k | h) in nats, in float32 at least.

        A row that ends in NO_LABEL has the probability of the tokens before, the others summed out.
        """

    @abstractmethod
    def start(self, hidden: Float[Tensor, "N W"], vocabulary: Vocabulary, law: Law = plain) -> Draft:
        """The draft before x_1. `law` turns logits into log-probabilities; a mixture applies it to each component,
        before conditionals are taken, so that they stay exact.
        """

    def sample(
        self,
        hidden: Float[Tensor, "N W"],
        uniform: Float[Tensor, "N k"],
        vocabulary: Vocabulary,
        law: Law = plain,
    ) -> Int[Tensor, "N k"]:
        """x_1..x_k drawn from the head alone, by inversion of numbers in [0, 1)."""
        return self.start(hidden, vocabulary, law).draw(uniform).tokens

    def training_loss(
        self, hidden: Float[Tensor, "N W"], tokens: Int[Tensor, "N k"], vocabulary: Vocabulary
    ) -> Float[Tensor, ""]:
        """Summed negative log-likelihood in nats of windows (`label_windows`) at the positions that who calls chose.

        Who calls divides by a global count of the tokens that are not NO_LABEL.
        """
        return self._penalty(hidden, tokens) - self.log_prob(hidden, tokens, vocabulary).sum()

    def _penalty(self, hidden: Float[Tensor, "N W"], tokens: Int[Tensor, "N k"]) -> Float[Tensor, ""]:
        """What the loss has beside the likelihood, times the number of tokens."""
        return hidden.new_zeros(())


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
