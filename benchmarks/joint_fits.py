"""The laws and the trained heads that `benchmarks.joint_tokens` measures. No command line.

A law is uniform over a few strings of k tokens. A head learns it exactly, by full-batch gradient descent on all
strings at once in float64; so what is left is what the head cannot say, or what descent does not find. The claims J1,
J2 and J3 are argued in docs/joint_tokens.md.

Shape letters: M strings, k tokens, N rows, D drafted tokens (k - 1), V vocabulary, W width.
"""

import itertools
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from mmgen.model.joint import (
    Drawn,
    JointConfig,
    JointHead,
    JointKind,
    MixtureHead,
    build_joint_head,
)
from mmgen.model.trunk import TrunkConfig
from mmgen.model.vocabulary import Vocabulary
from mmgen.sampling.verify import acceptance

TRUNK = TrunkConfig(width=8, ffn_width=16)
RANK = 4
FIRST_WORDS = ("high", "two", "full", "straight")
SECOND_WORDS = ("card", "pair", "house", "flush")


@dataclass(frozen=True)
class Case:
    """A uniform law over strings."""

    name: str
    strings: Int[Tensor, "M k"]
    vocab_size: int

    @property
    def num_tokens(self) -> int:
        return self.strings.shape[1]

    def conditionals(self, strings: Int[Tensor, "N k"]) -> Float[Tensor, "N k V"]:
        """The law of each token given those before it; 0 after a beginning that no string has."""
        found = []
        for i in range(self.num_tokens):
            same = (strings[:, None, :i] == self.strings[None, :, :i]).all(-1).double()
            counts = same @ nn.functional.one_hot(self.strings[:, i], self.vocab_size).double()
            found.append(counts / counts.sum(-1, keepdim=True).clamp(min=1))
        return torch.stack(found, 1)


HANDS = Case("poker hands", torch.tensor([[i, 4 + i] for i in range(4)]), 8)


def even_parity(num_bits: int) -> Case:
    """Bit strings with an even number of ones."""
    strings = [bits for bits in itertools.product((0, 1), repeat=num_bits) if sum(bits) % 2 == 0]
    return Case(f"{num_bits} bits, even parity", torch.tensor(strings), 2)


class InOneContext(nn.Module):
    """A head in one context: its hidden state is a constant, trained with the head and the (tied) vocabulary."""

    def __init__(self, head: JointHead, vocab_size: int) -> None:
        super().__init__()
        self.head = head
        self.hidden = nn.Parameter(torch.randn(1, TRUNK.width))
        self.matrix = nn.Parameter(torch.randn(vocab_size, TRUNK.width))

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(lambda ids: self.matrix[ids], self.matrix)

    def forward(self, strings: Int[Tensor, "N k"]) -> Float[Tensor, "N"]:
        """log q of each string, in nats."""
        return self.head.log_prob(self.hidden.expand(len(strings), -1), strings, self.vocabulary)


def fit(case: Case, kind: JointKind, components: int, seed: int, restarts: int, steps: int) -> InOneContext:
    """The best of `restarts` heads, trained side by side by Adam from random weights, and then by L-BFGS alone."""
    config = JointConfig(kind, case.num_tokens, max(components, 2), RANK)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        every = [_far_from_even(config, case.vocab_size) for _ in range(restarts)]
    best, (parameters, _) = every[0], stack_module_state(every)  # pyright: ignore[reportArgumentType]

    def losses() -> Float[Tensor, "restarts"]:
        return vmap(lambda one: -functional_call(best, one, (case.strings,)).mean())(parameters)

    optimizer = torch.optim.Adam(parameters.values(), lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        losses().sum().backward()
        optimizer.step()
        schedule.step()
    least = int(losses().argmin())
    best.load_state_dict({name: stacked[least].detach() for name, stacked in parameters.items()})
    _polish(best, case, steps)
    return best


def _far_from_even(config: JointConfig, vocab_size: int) -> InOneContext:
    """With weights so large that components, or states of a chain, differ from the first step on."""
    model = InOneContext(build_joint_head(config, TRUNK), vocab_size).double()
    for parameter in model.head.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.5 if config.kind == "mixture" else 1.0)
    return model


def _polish(model: InOneContext, case: Case, steps: int) -> None:
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = -model(case.strings).mean()
        value.backward()
        return value

    optimizer.step(loss)


@torch.no_grad()
def excess_bits(model: InOneContext, case: Case) -> float:
    """The relative entropy of the law to the head's, in bits a string: its loss beyond the law's own entropy."""
    return -model(case.strings).mean().item() / math.log(2) - math.log2(len(case.strings))


@torch.no_grad()
def real_mass(model: InOneContext, case: Case) -> float:
    """The probability that the head gives to strings of the law, all together."""
    return model(case.strings).exp().sum().item()


@torch.no_grad()
def pair_probabilities(model: InOneContext) -> Float[Tensor, "4 4"]:
    """The probability of each first word with each second one, of a head fitted to HANDS."""
    pairs = torch.cartesian_prod(torch.arange(4), torch.arange(4, 8))
    return model(pairs).exp().view(4, 4)


@torch.no_grad()
def tokens_per_pass(model: InOneContext, case: Case) -> float:
    """x_1, which is of the law itself, and the expected number of drafted tokens that verification keeps: exactly,
    as a sum over all drafts.
    """
    k = case.num_tokens
    strings = torch.tensor(list(itertools.product(range(case.vocab_size), repeat=k)))
    p = case.conditionals(strings)
    draft = model.head.start(model.hidden.expand(len(strings), -1), model.vocabulary)
    conditionals = []
    for i in range(1, k):
        draft = draft.extend(strings[:, i - 1])
        conditionals.append(draft.log_conditional().exp())
    drawn = Drawn(strings[:, 1:], torch.stack(conditionals, 1))
    drafted = drawn.probabilities.gather(-1, drawn.tokens[..., None]).squeeze(-1).prod(-1)
    first = p[:, 0].gather(-1, strings[:, :1]).squeeze(-1)
    kept = acceptance(drawn, p[:, 1:]).cumprod(-1).sum(-1)
    return 1 + (first * drafted * kept).sum().item()


def parity_by_hand(num_bits: int) -> InOneContext:
    """A hidden Markov head with even parity set by hand: its four states are (parity so far, this bit)."""
    config = JointConfig("hmm", num_bits, components=4, rank=1)
    head, sure = build_joint_head(config, TRUNK), 40.0  # exp(-40) is nothing beside 1 in float64
    assert isinstance(head, MixtureHead) and head.transition is not None
    model = InOneContext(head, 2).double()
    states = [(parity, bit) for parity in (0, 1) for bit in (0, 1)]
    transition = torch.full((num_bits - 1, 4, 4), -sure)
    for i, (a, (parity, _)), (b, (after, bit)) in itertools.product(
        range(num_bits - 1), enumerate(states), enumerate(states)
    ):
        # the last bit is the one that makes the parity even
        if after == parity ^ bit and (i < num_bits - 2 or after == 0):
            transition[i, a, b] = 0.0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        # h is the first unit vector, so a map's first column is its value; the components' states use the second
        model.hidden[0, 0] = 1.0
        model.matrix[:, 1] = torch.tensor([-sure / 2, sure / 2])
        head.prior.weight[:, 0] = torch.tensor([0.0 if parity == bit else -sure for parity, bit in states])
        head.transition.weight[:, 0] = transition.flatten()
        head.down.weight[:, 0] = 1.0
        for r, (_, bit) in enumerate(states):
            head.up[:, r, 1, 0] = (2 * bit - 1) / nn.functional.silu(torch.tensor(1.0))
    return model
