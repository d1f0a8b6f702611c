"""The loss of text: cross entropy in nats, token by token."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mmgen.sequence import NO_LABEL


def text_loss(logits: Float[Tensor, "N V"], labels: Int[Tensor, "N"]) -> Float[Tensor, "N"]:
    """Cross entropy of each label, 0 where it is NO_LABEL, in float32 at least."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, labels, ignore_index=NO_LABEL, reduction="none")
