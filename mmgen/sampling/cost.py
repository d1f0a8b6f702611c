"""What a call costs: floating-point operations of the network by what they were spent on, counted from shapes.

One multiply-add is two operations. Only matrix products are counted (linear maps and attention over the keys that a
call was given, masked ones included); norms, activations and the autoencoder are not.
"""

from dataclasses import dataclass, fields

from mmgen.model.time import NUM_FREQUENCIES
from mmgen.model.trunk import TrunkConfig


@dataclass
class Cost:
    """Compute spent so far: network evaluations of pictures (per picture; of one block each), operations by kind, and
    seconds. Kinds: reading what is given, refining, reading finished blocks, writing text, scoring candidates. `tokens`
    of text were written in `passes` of the trunk, both summed over requests. `memory` is the most bytes of keys and
    values that a batch held.
    """

    nfe: int = 0
    prefill_flops: float = 0.0
    refine_flops: float = 0.0
    commit_flops: float = 0.0
    decode_flops: float = 0.0
    score_flops: float = 0.0
    tokens: int = 0
    passes: int = 0
    seconds: float = 0.0
    memory: int = 0

    @property
    def flops(self) -> float:
        read = self.prefill_flops + self.commit_flops + self.score_flops
        return read + self.refine_flops + self.decode_flops

    def add(self, other: "Cost") -> None:
        """Adds what other requests cost; network evaluations are a request's, so the most that any took is kept."""
        for each in fields(self):
            mine, theirs = getattr(self, each.name), getattr(other, each.name)
            most = each.name in ("nfe", "memory")
            setattr(self, each.name, max(mine, theirs) if most else mine + theirs)

    def __str__(self) -> str:
        parts = [f"{self.nfe} network evaluations a picture"] if self.nfe else []
        if self.tokens:
            parts.append(f"{self.tokens} tokens in {self.passes} passes")
        parts.append(f"{self.flops / 1e9:.3g} GFLOP")
        return ", ".join([*parts, f"{self.seconds:.3g} s"] if self.seconds else parts)  # predicted: none


def trunk_flops(config: TrunkConfig, num_tokens: float, num_keys: float) -> float:
    """Operations of one pass of the blocks over `num_tokens` queries that each score `num_keys` keys."""
    heads = config.num_heads * config.head_dim
    kv_heads = config.num_kv_heads * config.head_dim
    linear = config.width * (2 * heads + 2 * kv_heads) + 3 * config.width * config.ffn_width
    return 2.0 * config.num_layers * num_tokens * (linear + 2 * heads * num_keys)


def context_flops(config: TrunkConfig, num_tokens: float, num_keys: float, channels: int) -> float:
    """`expand` of `num_tokens` tokens: the blocks, and the embedding of `channels`, which all of them pass (but 0 of
    them where new text alone is read).
    """
    return trunk_flops(config, num_tokens, num_keys) + 2.0 * num_tokens * config.width * channels


def state_flops(
    config: TrunkConfig,
    num_instances: float,
    num_tokens: float,
    num_keys: float,
    channels: int,
    all_channels: int,
) -> float:
    """`refine` of `num_tokens` tokens in all: blocks, embedding of `channels`, and the time conditioning.

    The heads of all continuous modalities, of `all_channels` together, are computed, whichever the tokens are of.
    """
    per_instance = 2 * (2 * NUM_FREQUENCIES * config.width + config.width**2)
    if config.modulates:
        projections = config.num_layers if config.time == "adaln" else 1
        per_instance += (6 * projections + 2) * config.width**2
    own = num_tokens * config.width * (channels + all_channels) + num_instances * per_instance
    return trunk_flops(config, num_tokens, num_keys) + 2.0 * own


def target_pass_ratio(config: TrunkConfig, context: float, state: float, channels: int) -> float:
    """Operations of a training step with a target pass over those of one without, for documents of `context` clean and
    `state` noisy tokens: the target's forward over three forwards of everything but the text head.

    Attention is counted as it is computed: a picture's tokens score all keys, a caption's those of their run.
    """
    clean = context_flops(config, context, context, channels)
    noisy = state_flops(config, 1, state, context + state, channels, channels)
    return 1 + noisy / (3 * (clean + noisy))


def head_flops(config: TrunkConfig, num_tokens: int, vocab_size: int) -> float:
    """Logits of `num_tokens` tokens."""
    return 2.0 * num_tokens * config.width * vocab_size
