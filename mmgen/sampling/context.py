"""A context that grows: what is given or made is appended, and read in one pass when something is drawn after it."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mmgen.modalities import Modality, Text
from mmgen.model.model import Model
from mmgen.sampling.cost import Cost, context_flops
from mmgen.sampling.graphs import Graphs
from mmgen.sampling.session import Session
from mmgen.sequence import Span


class Context:
    """The rows of a batch under one condition, with room for `more` tokens a row beyond `documents`.

    `spent` is the part of the cost that reading adds to; reading a block that was drawn here is a commit.
    """

    def __init__(
        self,
        model: Model,
        modalities: Mapping[str, Modality],
        documents: Sequence[Sequence[Span]],
        more: int,
        cost: Cost,
        spent: str = "prefill_flops",
        graphs: Graphs | None = None,
    ) -> None:
        longest = max(sum(map(len, spans)) for spans in documents)
        self.session = Session(model, modalities, len(documents), longest + more, graphs)
        self.cost = cost
        self.spent = spent
        self.channels = sum(modality.channels for modality in modalities.values())
        self._pending = [list(spans) for spans in documents]
        self._finished = False  # whether what is pending was made here

    def append(self, row: int, span: Span, finished: bool = False) -> None:
        """What a row reads next. `finished`: a block that was drawn here."""
        self._pending[row].append(span)
        self._finished |= finished

    def next_position(self, row: int) -> int:
        """Where the next span of a row begins."""
        pending = self._pending[row]
        return pending[-1].next_position if pending else self.session.positions[row]

    def read(self) -> Float[Tensor, "R W"]:
        """Reads what is pending, of which there is some in every row; final hidden states of each row's last token."""
        assert all(self._pending), "a row with nothing to read has no hidden state that could be told"
        hidden = self.session.read(self._pending)
        self._count()
        return hidden

    def read_all(self) -> Float[Tensor, "R L W"]:
        """`read`, returning the final hidden states of all that was pending, each row's from the left."""
        hidden = self.session.read_all(self._pending)
        self._count()
        return hidden

    @staticmethod
    def read_each(contexts: Sequence["Context"]) -> None:
        """`read` of each: in one pass those that have read nothing yet."""
        fresh = [context for context in contexts if not context.session.cache.length]
        if len(fresh) > 1:
            Session.read_first([each.session for each in fresh], [each._pending for each in fresh])
            total = sum(each._longest for each in fresh)
            for context in fresh:
                context._count(total)
        for context in contexts:
            if any(context._pending):
                context.read()

    @property
    def _longest(self) -> int:
        """Tokens that are pending in a row, at most."""
        return max(sum(map(len, spans)) for spans in self._pending)

    def _count(self, keys: int | None = None) -> None:
        """What reading cost, where each token scored so many keys: all that the context holds, if not said."""
        num = len(self._pending) * self._longest
        keys = self.session.cache.length if keys is None else keys
        spent = "commit_flops" if self._finished else self.spent
        flops = context_flops(self.session.model.config, num, keys, self.channels)
        setattr(self.cost, spent, getattr(self.cost, spent) + flops)
        self._pending = [[] for _ in self._pending]
        self._finished = False

    def settle(self, before: Sequence[int], written: Sequence[Sequence[int]], text: Text) -> None:
        """Makes each row hold what was written after its first `before` tokens, no more and no less: text that a pass
        read beyond its end is forgotten, and a last token that no pass has read is pending."""
        held = [length - start for length, start in zip(self.lengths, before, strict=True)]
        self.session.forget([max(0, num - len(ids)) for num, ids in zip(held, written, strict=True)])
        for row, (num, ids) in enumerate(zip(held, written, strict=True)):
            if rest := list(ids[num:]):
                self.append(row, text.span(rest, self.next_position(row), predicted=False))

    @property
    def lengths(self) -> list[int]:
        """Tokens that each row has read."""
        return self.session.cache.lengths

    @property
    def device(self) -> torch.device:
        return self.session.device
