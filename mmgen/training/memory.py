"""What a training step holds in memory beside weights and their states: what its forward pass saves, from shapes.

Counted is what autograd saves of `dense` attention by a fused kernel (the pairs' probabilities are never stored) and
fused norms (input and one number a token), a stored tensor once however many read it. The precision decides the bytes
of a number: `narrow` ones are inputs and outputs of matrix products, `wide` ones the residual lane, norms, modulation,
logits and losses.
"""

from dataclasses import dataclass

from mmgen.data.pack import PackConfig
from mmgen.model import vocabulary
from mmgen.model.joint import JointConfig
from mmgen.model.time import NUM_FREQUENCIES
from mmgen.model.trunk import Checkpointing, TrunkConfig
from mmgen.sampling.predict import ModelFacts
from mmgen.training.flops import Work

WIDE = {"bf16": 4, "float32": 4, "float64": 8}
NARROW = {"bf16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class Saved:
    """Bytes that the forward pass of one packed batch saves for the backward one."""

    casts: float
    """weights as autocast narrowed them, kept for the gradients of their inputs"""
    blocks: float
    """activations of all blocks"""
    biases: float
    """masks as the attention's kernel takes them: one number a pair, made anew and kept in every layer"""
    around: float
    """embeddings, final norms, modulation, heads and the losses of continuous modalities"""
    logits: float
    """log-probabilities of the predicted text, and of the joint head's windows with its activations"""

    @property
    def total(self) -> float:
        return self.casts + self.blocks + self.biases + self.around + self.logits


def saved_bytes(
    facts: ModelFacts,
    pack: PackConfig,
    work: Work,
    precision: str,
    checkpointing: Checkpointing = "none",
    particles: int = 0,
    fused_norms: bool = True,
    masked: bool = True,
) -> Saved:
    """Of a batch of `pack`'s shape; of `work` the real state tokens, instances, labels and windows count.

    `particles` M of an objective that compares groups, whose distances are saved (and whose target pass hands its
    state to every checkpointed block); 0 for others. `fused_norms`: torch has them on a GPU; on a CPU its norms also
    save what they normalized. `masked`: attention takes a mask of all pairs, as `dense` does and no other.
    """
    trunk, narrow, wide = facts.trunk, NARROW[precision], WIDE[precision]
    context, state = pack.rows * pack.context_length, pack.rows * pack.state_length
    layers = trunk.num_layers
    if checkpointing == "none":
        blocks = layers * block_bytes(facts, pack, precision, fused_norms)
    else:
        streams = context + state + (state if particles else 0)
        per_block = wide * trunk.width * streams
        if checkpointing == "selective":
            per_block += (context + state) * (narrow * _products(trunk) + 4 * trunk.num_heads)
        blocks = layers * per_block
    return Saved(
        casts=narrow * cast_parameters(facts) if narrow < wide else 0.0,
        blocks=blocks,
        biases=layers * bias_bytes(pack, precision) if masked and checkpointing == "none" else 0.0,
        around=_around(facts, context, state, work, precision, particles, fused_norms),
        logits=wide * (_kept_logits(work.labels, facts.vocab_size) + work.labels * trunk.width)
        + _joint_saved(facts, work, wide, fused_norms),
    )


def block_bytes(facts: ModelFacts, pack: PackConfig, precision: str, fused_norms: bool = True) -> float:
    """Saved by one block of both streams, but for the masks: what a recomputed block holds too."""
    trunk, narrow, wide = facts.trunk, NARROW[precision], WIDE[precision]
    context, state = pack.rows * pack.context_length, pack.rows * pack.state_length
    heads, kv_heads = trunk.num_heads * trunk.head_dim, trunk.num_kv_heads * trunk.head_dim
    norms = 1 if fused_norms else 2
    per_token = 2 * wide * (norms * trunk.width + 1)  # what comes into both norms
    per_token += 2 * narrow * trunk.width  # and what enters the products after them
    per_token += wide * (
        norms * (heads + kv_heads) + trunk.num_heads + trunk.num_kv_heads
    )  # norms of q and k
    per_token += 2 * narrow * heads + 4 * trunk.num_heads  # q, the output, and its log-sum-exp
    per_token += 4 * narrow * trunk.ffn_width  # gate, silu of it, up, and their product
    if narrow < wide:
        per_token += 2 * narrow * trunk.head_dim  # cosines and sines, narrowed for q and for k
    modulated = 8 * wide * trunk.width if trunk.modulates else 0  # scale, gate and what they multiply
    # keys and values, repeated to as many heads as there are of queries; the state reads the context's too
    keys = 2 * narrow * heads * (context + context + state)
    return per_token * (context + state) + modulated * state + keys


def bias_bytes(pack: PackConfig, precision: str) -> float:
    """The masks of both streams in one layer, as numbers that are added to the scores."""
    return NARROW[precision] * mask_pairs(pack)


def mask_pairs(pack: PackConfig) -> int:
    """Entries of the dense masks: context by context, and state by both. A byte each, once a batch."""
    context, state = pack.context_length, pack.state_length
    return pack.rows * (context**2 + state * (context + state))


def logits_gradient_bytes(facts: ModelFacts, work: Work, precision: str) -> float:
    """The most that the backward pass of a softmax over the vocabulary makes at once: two gradients beside it."""
    most = work.labels
    if facts.joint is not None:
        most = max(most, work.windows * _components(facts.joint))
    return 2 * WIDE[precision] * min(most * facts.vocab_size, vocabulary.HELD)


def target_bytes(facts: ModelFacts, pack: PackConfig, precision: str, masked: bool = True) -> float:
    """What the target pass holds while a block computes it: its own state, keys and values, and the widest product."""
    trunk, narrow, wide = facts.trunk, NARROW[precision], WIDE[precision]
    context, state = pack.rows * pack.context_length, pack.rows * pack.state_length
    heads = trunk.num_heads * trunk.head_dim
    attention = narrow * (2 * heads * (context + state) + 2 * heads * state)
    if masked:
        attention += bias_bytes(pack, precision)
    return 3 * wide * trunk.width * state + max(attention, 3 * narrow * trunk.ffn_width * state)


def working_bytes(
    facts: ModelFacts, pack: PackConfig, precision: str, checkpointing: Checkpointing, masked: bool = True
) -> float:
    """What the backward pass of a block holds beside what was saved: gradients, and what it computes again."""
    trunk, narrow, wide = facts.trunk, NARROW[precision], WIDE[precision]
    context, state = pack.rows * pack.context_length, pack.rows * pack.state_length
    gradients = 2 * wide * trunk.width * (context + state) + 3 * narrow * trunk.ffn_width * max(
        context, state
    )
    if checkpointing == "none":
        return gradients
    masks = bias_bytes(pack, precision) if masked else 0.0
    return gradients + block_bytes(facts, pack, precision) + masks


def cast_parameters(facts: ModelFacts) -> float:
    """Weights that autocast narrows: of the blocks' products and of the embeddings of values."""
    trunk = facts.trunk
    heads, kv_heads = trunk.num_heads * trunk.head_dim, trunk.num_kv_heads * trunk.head_dim
    ffn = 3 * trunk.width * trunk.ffn_width * (2 if trunk.state_ffn else 1)
    return trunk.num_layers * (trunk.width * (2 * heads + 2 * kv_heads) + ffn)


def _products(trunk: TrunkConfig) -> int:
    """Numbers a token that a block's products put out: q, k, v, attention, and its map; gate, up and down."""
    heads, kv_heads = trunk.num_heads * trunk.head_dim, trunk.num_kv_heads * trunk.head_dim
    return 2 * heads + 2 * kv_heads + 2 * trunk.ffn_width + 2 * trunk.width


def _around(
    facts: ModelFacts, context: int, state: int, work: Work, precision: str, particles: int, fused_norms: bool
) -> float:
    trunk, narrow, wide = facts.trunk, NARROW[precision], WIDE[precision]
    channels, adaln = facts.all_channels, trunk.modulates
    values = narrow * channels * (context + state)
    rope = wide * trunk.head_dim * (context + state) if narrow == wide else 0
    final = wide * trunk.width * (context + state * (4 if adaln else 2))
    if not fused_norms:
        final += wide * trunk.width * (context + state)
    losses = wide * channels * (2 * particles * work.state if particles else state)
    waves = 2 * wide * work.instances * (2 * NUM_FREQUENCIES + 2 * trunk.width)
    modulation = 0.0
    if adaln:
        # not saved, but alive from the first block to the last, and so is its gradient
        modulation = wide * work.instances * trunk.width * (2 + 6 * trunk.num_layers)
    return values + rope + final + losses + waves + modulation


def _joint_saved(facts: ModelFacts, work: Work, wide: int, fused_norms: bool) -> float:
    joint, trunk = facts.joint, facts.trunk
    if joint is None:
        return 0.0
    if joint.kind == "chain":
        layer = (7 if fused_norms else 11) * trunk.width + 4 * trunk.ffn_width
        rows, each = work.windows, (joint.tokens - 1) * layer
    else:
        rows = work.windows * _components(joint)
        each = joint.tokens * (_components(joint) * trunk.width + 2 * joint.rank)
    logits = joint.tokens * _kept_logits(rows, facts.vocab_size)
    return wide * (logits + work.windows * (each + trunk.width))


def _kept_logits(rows: float, vocab_size: int) -> float:
    """Logits that wait for their backward pass: all of a call, or none where they are made a part at a time."""
    return rows * vocab_size if rows * vocab_size <= vocabulary.HELD else 0.0


def _components(joint: JointConfig) -> int:
    return 1 if joint.kind in ("independent", "chain") else joint.components
