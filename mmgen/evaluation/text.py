"""Bits per byte: the compression that a model's probabilities would give, comparable between tokenizers."""

import math

from jaxtyping import Float, Int
from torch import Tensor

from mmgen.evaluation.intervals import Estimate, Key, ratio


def bits_per_byte(nats: Float[Tensor, " N"], num_bytes: Int[Tensor, " N"], key: Key) -> Estimate:
    """Summed negative log-likelihood over summed UTF-8 bytes, in bits, with its bootstrap interval over documents.

    `nats[i]` is the negative log-likelihood of ALL tokens of document i. Raises ValueError when a document has
    no byte."""
    assert len(nats) == len(num_bytes), "one likelihood per document"
    if len(nats) == 0 or num_bytes.min() < 1:
        raise ValueError("bits per byte need documents of at least one byte")
    return ratio(nats.double() / math.log(2), num_bytes, key)
