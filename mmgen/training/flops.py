"""What a training step computes, by part: floating-point operations of its matrix products, counted from shapes.

One multiply-add is two operations, as in mmgen/sampling/cost.py, whose forward passes these are; norms, activations and
losses are not counted. A `Work` says of how many tokens and pairs of a query and a key: `attended` counts real tokens
and the pairs that the mask rule allows, which is what an MFU is of; `computed` counts every token of the rows and the
dense rectangle of pairs, which is what `dense` attention takes time for.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields

from jaxtyping import Bool
from torch import Tensor

from mmgen.model.attention.rule import count_pairs
from mmgen.model.joint import JointConfig
from mmgen.model.time import NUM_FREQUENCIES
from mmgen.model.trunk import TrunkConfig
from mmgen.sampling.cost import context_flops, state_flops, trunk_flops
from mmgen.sampling.predict import ModelFacts
from mmgen.sequence import NO_LABEL, PAD, Layout, PackedBatch

NEWTON_SCHULZ_STEPS = 5  # of torch.optim.Muon, whose default this project keeps


@dataclass(frozen=True)
class Work:
    """What a packed batch asks of the network."""

    context: float
    """tokens of the context stream"""
    state: float
    """tokens of the state stream"""
    context_pairs: float
    """pairs of a context token and one that it reads"""
    state_pairs: float
    """pairs of a state token and one that it reads, of either stream"""
    instances: float
    """noisy copies of a block, each with a time of its own"""
    labels: float
    """tokens of text that are predicted"""
    windows: float = 0.0
    """places at which a joint head is trained"""

    @classmethod
    def attended(cls, batch: PackedBatch, windows: Bool[Tensor, "B C"] | None = None) -> "Work":
        """Real tokens of a batch, and the pairs that the mask rule allows."""
        context, state = batch.context.layout, batch.state.layout
        return cls(
            _count(context.document != PAD),
            _count(state.document != PAD),
            count_pairs(context, context),
            count_pairs(state, Layout.concat([context, state])),
            *_rest(batch, windows),
        )

    @classmethod
    def computed(cls, batch: PackedBatch, windows: Bool[Tensor, "B C"] | None = None) -> "Work":
        """All tokens of a batch's rows, padding included, and the whole rectangles that `dense` attention computes."""
        rows, context = batch.context.layout.shape
        state = batch.state.layout.shape[1]
        pairs = rows * context**2, rows * state * (context + state)
        return cls(rows * context, rows * state, *pairs, *_rest(batch, windows))

    def times(self, number: float) -> "Work":
        """That of so many batches."""
        return Work(*(number * getattr(self, each.name) for each in fields(self)))


def _rest(batch: PackedBatch, windows: Tensor | None) -> tuple[int, int, int]:
    trained = 0 if windows is None else _count(windows)
    return len(batch.instances.num_tokens), _count(batch.labels != NO_LABEL), trained


def _count(here: Tensor) -> int:
    return int(here.sum())


@dataclass(frozen=True)
class StepFlops:
    """Operations of one training step by part. A backward pass is twice its forward one, but for what reads data."""

    context_forward: float
    context_backward: float
    state_forward: float
    state_backward: float
    target: float
    """the pass without gradient that a two-time objective compares with (IMM); 0 for others"""
    text_head: float
    """logits of the predicted text, forward and backward"""
    joint_head: float
    """forward and backward, its softmaxes over the vocabulary included"""

    @property
    def total(self) -> float:
        return sum(getattr(self, each.name) for each in fields(self))


def step_flops(facts: ModelFacts, work: Work, target: bool) -> StepFlops:
    """The parts of a step's forward and backward pass; `target`: whether the objective makes a target pass.

    Nothing is counted twice where activations are recomputed (see `recomputed_flops`), as MFU wants it.
    """
    trunk, channels = facts.trunk, facts.all_channels
    context = context_flops(trunk, work.context, _keys(work.context_pairs, work.context), channels)
    instances, keys = work.instances, _keys(work.state_pairs, work.state)
    state = state_flops(trunk, instances, work.state, keys, channels, channels)
    # values and the waves of the times are data: no gradient is made for them
    embedded = 2.0 * trunk.width * channels
    waves = 2.0 * 2 * (2 * NUM_FREQUENCIES) * trunk.width * work.instances
    return StepFlops(
        context_forward=context,
        context_backward=2 * context - embedded * work.context,
        state_forward=state,
        # a model of text alone has a state stream of padding, which no loss reads
        state_backward=2 * state - embedded * work.state - waves if channels else 0.0,
        target=state if target else 0.0,
        text_head=3.0 * 2 * work.labels * trunk.width * facts.vocab_size,
        joint_head=0.0 if facts.joint is None else _joint_flops(facts.joint, facts, work.windows),
    )


def recomputed_flops(facts: ModelFacts, work: Work) -> float:
    """Operations that full activation checkpointing of the blocks adds: the forward pass of both streams once more.

    The target pass saves nothing and is the last of a block, so recomputation stops before it.
    """
    streams = ((work.context, work.context_pairs), (work.state, work.state_pairs))
    return sum(trunk_flops(facts.trunk, tokens, _keys(pairs, tokens)) for tokens, pairs in streams)


def muon_flops(shapes: Iterable[tuple[int, int]]) -> float:
    """Newton-Schulz iterations of one optimizer step over matrices of these shapes (torch.optim.Muon's own form).

    Each of the five multiplies X by its transpose, the square of that with itself, and the result with X, X lying down.
    """
    total = 0.0
    for shape in shapes:
        low, high = sorted(shape)
        total += NEWTON_SCHULZ_STEPS * 2.0 * (2 * low * low * high + low**3)
    return total


def _keys(pairs: float, tokens: float) -> float:
    return pairs / tokens if tokens else 0.0


def _joint_flops(config: JointConfig, facts: ModelFacts, windows: float) -> float:
    """A joint head's loss at `windows` places, forward and twice that backward."""
    forward = _chain_forward if config.kind == "chain" else _mixture_forward
    return 3.0 * windows * forward(config, facts.trunk, facts.vocab_size)


def _chain_forward(config: JointConfig, trunk: TrunkConfig, vocab_size: int) -> float:
    """Of one window of the chain head: k softmaxes, and k - 1 applications of its layer."""
    layer = 2 * trunk.width**2 + 3 * trunk.width * trunk.ffn_width
    return 2.0 * ((config.tokens - 1) * layer + config.tokens * trunk.width * vocab_size)


def _mixture_forward(config: JointConfig, trunk: TrunkConfig, vocab_size: int) -> float:
    """Of one window of the heads with a latent; the weights of its components are made for the likelihood and again
    for the term that keeps them in use.
    """
    components = 1 if config.kind == "independent" else config.components
    width, k = trunk.width, config.tokens
    state = width * config.rank + components * width * (config.rank + vocab_size)
    weights = width * components
    if config.kind == "hmm":  # all transitions of the window are computed for each of its tokens
        weights += (k - 1) * width * (k - 1) * components**2
    return 2.0 * (k * state + 2 * weights)
