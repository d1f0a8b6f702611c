"""The vocabulary as hidden states meet it: the text embedding, and the unembedding with its softmax."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmgen.sequence import NO_LABEL

# Logits that are held at once: 256 MB in float32. Where there are more, torch makes them a part at a time, and again in
# the backward pass: a third more products there, and memory that grows neither with the vocabulary nor with the batch.
HELD = 2**26


@dataclass(frozen=True)
class Vocabulary:
    """What a model lends its joint heads too. `weight` is the unembedding."""

    embed: Callable[[Int[Tensor, "N"]], Float[Tensor, "N W"]]
    weight: Float[Tensor, "V W"]

    def logits(self, hidden: Float[Tensor, "... W"]) -> Float[Tensor, "... V"]:
        """In the dtype of the weights (float32) whatever the autocast."""
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.to(self.weight.dtype), self.weight)

    def log_prob(self, hidden: Float[Tensor, "*N W"], tokens: Int[Tensor, "*N"]) -> Float[Tensor, "*N"]:
        """Of one token after each hidden state, in nats; 0 where it is NO_LABEL. At most HELD logits at once."""
        rows = hidden.flatten(0, -2).to(self.weight.dtype)
        per_chunk = max(HELD // len(self.weight), 1)
        with torch.autocast(hidden.device.type, enabled=False):
            loss = _cross_entropy(rows, self.weight, tokens.flatten(), per_chunk)
        return -loss.view(tokens.shape)


def _cross_entropy(
    rows: Float[Tensor, "N W"], weight: Float[Tensor, "V W"], tokens: Int[Tensor, "N"], per_chunk: int
) -> Float[Tensor, "N"]:
    """Of each row's logits, `per_chunk` rows at a time where there are more."""
    try:
        from torch.nn import LinearCrossEntropyOptions
    except ImportError:  # before torch 2.13
        return _cross_entropy_by_hand(rows, weight, tokens, per_chunk)
    chunks = LinearCrossEntropyOptions(batch_chunk_size=per_chunk) if len(rows) > per_chunk else None
    return F.linear_cross_entropy(
        rows, weight, tokens, reduction="none", ignore_index=NO_LABEL, options=chunks
    )


def _cross_entropy_by_hand(
    rows: Float[Tensor, "N W"], weight: Float[Tensor, "V W"], tokens: Int[Tensor, "N"], per_chunk: int
) -> Float[Tensor, "N"]:
    def part(some: Tensor, weight: Tensor, of: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(some, weight), of, reduction="none", ignore_index=NO_LABEL)

    if len(rows) <= per_chunk:
        return part(rows, weight, tokens)
    parts = zip(rows.split(per_chunk), tokens.split(per_chunk), strict=True)
    # made again in the backward pass, as torch's own are
    losses = [checkpoint(part, some, weight, of, use_reentrant=False) for some, of in parts]
    return torch.cat([loss for loss in losses if loss is not None])
