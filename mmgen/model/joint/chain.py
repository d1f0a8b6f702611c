"""The chain head: one layer applied k - 1 times, so that each token reads the ones before it.

Shape letters as in base.py.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmgen.model.joint.base import Draft, JointConfig, JointHead, Law, plain
from mmgen.model.trunk import FeedForward, TrunkConfig
from mmgen.model.vocabulary import Vocabulary


class ChainHead(JointHead):
    """g_1 = h, g_(i+1) = Layer([norm g_i; norm E(x_i)]), q(x_i | h, x_1..x_(i-1)) = softmax(U g_i).

    The layer is a linear map to the trunk's width and a feed-forward block of the trunk's; its weights are the same
    for all i. The first term of the likelihood is the trunk's own next-token loss.
    """

    def __init__(self, config: JointConfig, trunk: TrunkConfig) -> None:
        super().__init__(config)
        self.state_norm = nn.RMSNorm(trunk.width, eps=trunk.norm_eps)
        self.token_norm = nn.RMSNorm(trunk.width, eps=trunk.norm_eps)
        self.join = nn.Linear(2 * trunk.width, trunk.width, bias=False)
        self.mlp_norm = nn.RMSNorm(trunk.width, eps=trunk.norm_eps)
        self.mlp = FeedForward(trunk)
        self.norm = nn.RMSNorm(trunk.width, eps=trunk.norm_eps)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)

    def step(self, state: Float[Tensor, "N W"], embedded: Float[Tensor, "N W"]) -> Float[Tensor, "N W"]:
        """g_(i+1) from g_i and E(x_i)."""
        dtype = self.norm.weight.dtype  # norms and the residual lane: autocast does not narrow them
        state, embedded = self.state_norm(state.to(dtype)), self.token_norm(embedded.to(dtype))
        x = self.join(torch.cat([state, embedded], -1)).to(dtype)
        return self.norm(x + self.mlp(self.mlp_norm(x)).to(dtype))

    def log_prob(
        self, hidden: Float[Tensor, "N W"], tokens: Int[Tensor, "N k"], vocabulary: Vocabulary
    ) -> Float[Tensor, "N"]:
        state, terms = hidden, []
        for offset in range(self.num_tokens):
            if offset:
                # after a window's end any token will do: its term is 0
                state = self.step(state, vocabulary.embed(tokens[:, offset - 1].clamp(min=0)))
            terms.append(vocabulary.log_prob(state, tokens[:, offset]))
        return torch.stack(terms).sum(0)

    @staticmethod
    def draft_flops(trunk: TrunkConfig, num_drafted: int, vocab_size: int) -> float:
        """See `joint.draft_flops`."""
        layer = 2 * trunk.width**2 + 3 * trunk.width * trunk.ffn_width
        return 2.0 * num_drafted * (layer + trunk.width * vocab_size)

    def start(self, hidden: Float[Tensor, "N W"], vocabulary: Vocabulary, law: Law = plain) -> "ChainDraft":
        return ChainDraft(self, vocabulary, law, hidden)


@dataclass(frozen=True)
class ChainDraft(Draft):
    head: ChainHead
    vocabulary: Vocabulary
    law: Law
    state: Float[Tensor, "N W"]

    def log_conditional(self) -> Float[Tensor, "N V"]:
        return self.law(self.vocabulary.logits(self.state))

    def extend(self, tokens: Int[Tensor, "N"]) -> "ChainDraft":
        state = self.head.step(self.state, self.vocabulary.embed(tokens))
        return ChainDraft(self.head, self.vocabulary, self.law, state)
