"""Heads with a latent: a mixture of products (CP), its hidden Markov variant, and one product as the baseline.

Shape letters as in base.py.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmgen.model.joint.base import Draft, JointConfig, JointHead, Law, plain
from mmgen.model.trunk import TrunkConfig
from mmgen.model.vocabulary import Vocabulary
from mmgen.sequence import NO_LABEL

TINY = 1e-30  # the logarithm of a use of 0 has no gradient


class MixtureHead(JointHead):
    """sum over z of pi(z_1) prod_i q_i(x_i | z_i) T_i(z_i, z_(i+1)), all of them functions of h.

    q_i(. | r) = softmax(U (h + B_ir silu(A_i h))) with the unembedding U and A, B of low rank. A mixture has one
    latent for the window, so no T; the independent head is a mixture of one component.
    """

    def __init__(self, config: JointConfig, trunk: TrunkConfig) -> None:
        super().__init__(config)
        k, width = config.tokens, trunk.width
        num = _num_components(config)
        self.num_components, self.rank, self.balance = num, config.rank, config.balance
        self.prior = nn.Linear(width, num, bias=False)
        self.down = nn.Linear(width, k * config.rank, bias=False)
        self.up = nn.Parameter(torch.empty(k, num, width, config.rank))
        self.transition = nn.Linear(width, (k - 1) * num * num, bias=False) if config.kind == "hmm" else None
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)

    def log_prior(self, hidden: Float[Tensor, "N W"]) -> Float[Tensor, "N R"]:
        """log pi, of the latent of the first token."""
        return plain(self.prior(hidden))

    def states(self, hidden: Float[Tensor, "N W"], offset: int) -> Float[Tensor, "N R W"]:
        """The hidden state of each component for token `offset`, counted from 0."""
        rows = slice(offset * self.rank, (offset + 1) * self.rank)
        low = F.silu(F.linear(hidden, self.down.weight[rows]))
        return hidden[:, None] + torch.einsum("nd,rwd->nrw", low, self.up[offset])

    def advance(
        self, log_weights: Float[Tensor, "N R"], hidden: Float[Tensor, "N W"], offset: int
    ) -> Float[Tensor, "N R"]:
        """Log-weights of the latent of token `offset`, turned into those of the next token's."""
        if self.transition is None:
            return log_weights
        shape = (self.num_tokens - 1, self.num_components, self.num_components)
        transition = plain(self.transition(hidden).unflatten(-1, shape)[:, offset])
        return (log_weights[..., None] + transition).logsumexp(-2)

    def log_prob(
        self, hidden: Float[Tensor, "N W"], tokens: Int[Tensor, "N k"], vocabulary: Vocabulary
    ) -> Float[Tensor, "N"]:
        log_weights = self.log_prior(hidden)
        for offset in range(self.num_tokens):
            if offset:
                log_weights = self.advance(log_weights, hidden, offset - 1)
            states = self.states(hidden, offset)
            each = tokens[:, offset, None].expand(states.shape[:-1])
            log_weights = log_weights + vocabulary.log_prob(states, each)
        return log_weights.logsumexp(-1)

    @staticmethod
    def draft_flops(config: JointConfig, trunk: TrunkConfig, num_drafted: int, vocab_size: int) -> float:
        """See `joint.draft_flops`."""
        num, width = _num_components(config), trunk.width
        # x_1 too is weighed by each component
        states = (num_drafted + 1) * (width * config.rank + num * width * (config.rank + vocab_size))
        # those of the whole window are computed for every token
        transitions = num_drafted * width * (config.tokens - 1) * num**2 if config.kind == "hmm" else 0
        return 2.0 * (width * num + states + transitions)

    def start(self, hidden: Float[Tensor, "N W"], vocabulary: Vocabulary, law: Law = plain) -> "MixtureDraft":
        return MixtureDraft(self, hidden, vocabulary, law, self.log_prior(hidden), 0)

    def _penalty(self, hidden: Float[Tensor, "N W"], tokens: Int[Tensor, "N k"]) -> Float[Tensor, ""]:
        """How far the mean use of the latents is from uniform, in nats, as a mean over offsets."""
        counted = tokens[:, :1] != NO_LABEL
        log_weights, total = self.log_prior(hidden), hidden.new_zeros(())
        for offset in range(self.num_tokens):
            if offset:
                log_weights = self.advance(log_weights, hidden, offset - 1)
            use = (log_weights.exp() * counted).sum(0) / counted.sum().clamp(min=1)
            total = total + torch.xlogy(use, (use * self.num_components).clamp(min=TINY)).sum()
        return self.balance * (tokens != NO_LABEL).sum() * total / self.num_tokens


def _num_components(config: JointConfig) -> int:
    return 1 if config.kind == "independent" else config.components


@dataclass(frozen=True)
class MixtureDraft(Draft):
    """`log_weights` are of the latent of token `offset`, given the tokens before."""

    head: MixtureHead
    hidden: Float[Tensor, "N W"]
    vocabulary: Vocabulary
    law: Law
    log_weights: Float[Tensor, "N R"]
    offset: int

    @cached_property
    def _logits(self) -> Float[Tensor, "N R V"]:
        assert self.offset < self.head.num_tokens, "a window has k tokens"
        return self.vocabulary.logits(self.head.states(self.hidden, self.offset))

    @cached_property
    def _components(self) -> Float[Tensor, "N R V"]:
        return self.law(self._logits)

    def log_conditional(self) -> Float[Tensor, "N V"]:
        return (self.log_weights[..., None] + self._components).logsumexp(1)

    def extend(self, tokens: Int[Tensor, "N"]) -> "MixtureDraft":
        index = tokens[:, None, None].expand(-1, self.head.num_components, 1)
        posterior = self.log_weights + self._components.gather(-1, index).squeeze(-1)
        # the trunk's x_1 may lie outside of every component's nucleus: then by what softmax alone says
        ruled_out = posterior.isneginf().all(-1, keepdim=True)
        untruncated = self.log_weights + plain(self._logits).gather(-1, index).squeeze(-1)
        log_weights = untruncated.where(ruled_out, posterior).log_softmax(-1)
        offset = self.offset + 1
        if offset < self.head.num_tokens:
            log_weights = self.head.advance(log_weights, self.hidden, self.offset)
        return MixtureDraft(self.head, self.hidden, self.vocabulary, self.law, log_weights, offset)
