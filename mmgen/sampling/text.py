"""A session that writes text, as speculative sampling sees it."""

from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor

from mmgen.model.joint import draft_flops
from mmgen.sampling.cost import Cost, context_flops, head_flops
from mmgen.sampling.session import Session


class TextDecoder:
    """Reads tokens into a session and takes them back; counts what its passes, and the drafts before them, cost."""

    def __init__(self, session: Session, cost: Cost) -> None:
        self.session = session
        self.cost = cost
        self._num_read = 0

    def advance(self, tokens: Int[Tensor, "N k"]) -> tuple[Float[Tensor, "N k V"], Float[Tensor, "N k W"]]:
        """Reads k tokens a row. Returns, after each, the logits of the next token and the hidden state."""
        session, model = self.session, self.session.model
        num_rows, self._num_read = tokens.shape
        num_keys = session.cache.length + self._num_read
        hidden, logits = session.write(tokens)
        num = num_rows * self._num_read
        if self._num_read > 1:
            assert model.joint_head is not None, "a draft needs a head"
            head = model.joint_head.config
            drafted = draft_flops(head, model.config, self._num_read - 1, logits.shape[-1])
            self.cost.decode_flops += num_rows * drafted
        self.cost.decode_flops += context_flops(model.config, num, num_keys, channels=0)
        self.cost.decode_flops += head_flops(model.config, num, logits.shape[-1])
        return logits, hidden

    def truncate(self, num_tokens: Sequence[int]) -> None:
        """Forgets what the last `advance` read but for the first `num_tokens` of each row."""
        self.session.forget([self._num_read - num for num in num_tokens])
