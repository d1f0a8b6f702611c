"""The vocabulary as hidden states meet it: the text embedding, and the unembedding with its softmax."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import LinearCrossEntropyOptions

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
        chunks = LinearCrossEntropyOptions(batch_chunk_size=per_chunk) if len(rows) > per_chunk else None
        with torch.autocast(hidden.device.type, enabled=False):
            loss = F.linear_cross_entropy(
                rows, self.weight, tokens.flatten(), reduction="none", ignore_index=NO_LABEL, options=chunks
            )
        return -loss.view(tokens.shape)
