"""A session: rows of half-finished documents over one model, with their key/value cache.

The two verbs of the design, batched over requests: `read` expands (what it reads is committed and never revised),
`output` refines (it reads the cache and writes nothing). Rows may have read different numbers of tokens: padding is a
token of no document, which the mask rule hides.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmgen.modalities import Modality
from mmgen.modalities.layout import BatchWriter, span_lengths
from mmgen.model.attention import plan_attention
from mmgen.model.model import Model
from mmgen.model.trunk import KeyValue
from mmgen.sampling.loops import Output
from mmgen.sequence import PAD, Layout, Span, move

ToldTarget = Callable[[Tensor, Tensor], Tensor]


class Cache:
    """Keys and values of what was read, in tensors allocated once [rows, capacity, K, E], and their layout.

    Each row's tokens stand together from the left: `lengths` of them, of `length` at most.
    """

    def __init__(self, rows: int, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.kvs: list[KeyValue] = []
        pad = torch.full((rows, capacity), PAD, device=device)
        public = torch.zeros(rows, capacity, dtype=torch.bool, device=device)
        self._layout = Layout(pad, pad.clone(), pad.clone(), public)

    @property
    def length(self) -> int:
        return int(self.lengths.max())

    @property
    def layout(self) -> Layout:
        here = slice(self.length)
        own = self._layout
        return Layout(own.document[:, here], own.block[:, here], own.rank[:, here], own.public[:, here])

    def append(self, kvs: Sequence[KeyValue], layout: Layout) -> None:
        """Adds the tokens of `layout` that are of a document; each row's come first in it."""
        row, column = (layout.document != PAD).nonzero(as_tuple=True)
        place = row, self.lengths[row] + column
        self.lengths = self.lengths + (layout.document != PAD).sum(1)
        assert self.length <= self.capacity, "a cache is made large enough for its plan"
        if not self.kvs:
            shape = (len(self.lengths), self.capacity, *kvs[0][0].shape[2:])
            self.kvs = [(k.new_zeros(shape), v.new_zeros(shape)) for k, v in kvs]
        for own, new in zip(self.kvs, kvs, strict=True):
            for mine, made in zip(own, new, strict=True):
                mine[place] = made[row, column]
        for name in ("document", "block", "rank", "public"):
            getattr(self._layout, name)[place] = getattr(layout, name)[row, column]

    def truncate(self, lengths: Int[Tensor, "R"]) -> None:
        """Forgets what each row has beyond its new length."""
        self.lengths = lengths
        beyond = torch.arange(self.capacity, device=lengths.device) >= lengths[:, None]
        self._layout.document[beyond] = PAD

    def past(self) -> list[KeyValue]:
        return [(k[:, : self.length], v[:, : self.length]) for k, v in self.kvs]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for pair in self.kvs for tensor in pair)


class Session:
    """Rows of documents that grow. `capacity` bounds the tokens that a row can read."""

    def __init__(self, model: Model, modalities: Mapping[str, Modality], rows: int, capacity: int) -> None:
        self.model = model
        self.modalities = modalities
        self.device = next(model.parameters()).device
        self.cache = Cache(rows, capacity, self.device)
        self.rows = rows
        self.ranks = [0] * rows
        self.positions = [0] * rows
        self._block = 0

    def read(self, spans: Sequence[Sequence[Span]]) -> Float[Tensor, "R W"]:
        """Expand each row by its spans; an empty list leaves a row as it is.

        Returns the final hidden state of each row's last new token (some token's, for a row that read nothing).
        """
        hidden = self.read_all(spans)
        lengths = [sum(span_lengths(span)[0] for span in row) for row in spans]
        last = torch.tensor(lengths, device=self.device).clamp(min=1) - 1
        return hidden[torch.arange(self.rows, device=self.device), last]

    def read_all(self, spans: Sequence[Sequence[Span]]) -> Float[Tensor, "R L W"]:
        """`read`, returning the final hidden states of all new tokens, each row's from the left."""
        lengths = [sum(span_lengths(span)[0] for span in row) for row in spans]
        writer = BatchWriter(self.rows, max(lengths), 0, self.modalities, first_block=self._block)
        for row, items in enumerate(spans):
            writer.begin(row, document=row, rank=self.ranks[row])
            for span in items:
                self.ranks[row] = writer.add(span)
                self.positions[row] = span.next_position
        self._block = writer.block
        stream = move(writer.context, self.device)
        keys = Layout.concat([self.cache.layout, stream.layout])
        attend = plan_attention(stream.layout, keys, "dense")
        hidden, kvs = self.model.expand(stream, attend, self.cache.past() or None)
        self.cache.append(kvs, stream.layout)
        return hidden

    def forget(self, num_tokens: Sequence[int]) -> None:
        """Takes back the last tokens of each row; they are of text."""
        for row, num in enumerate(num_tokens):
            self.ranks[row] -= num
            self.positions[row] -= num
        self.cache.truncate(self.cache.lengths - torch.tensor(num_tokens, device=self.device))

    def output(self, spans: Sequence[Span], told_target: ToldTarget) -> Output:
        """G(x, t, s | what each row has read), for one noisy span a row at the row's present rank; x is [R, S, D]."""
        name = spans[0].modality
        writer = BatchWriter(self.rows, 0, max(map(len, spans)), self.modalities, first_block=self._block)
        for row, span in enumerate(spans):
            writer.begin(row, document=row, rank=self.ranks[row])
            writer.add(span)
        stream = move(writer.state, self.device)
        attend = plan_attention(stream.layout, Layout.concat([self.cache.layout, stream.layout]), "dense")
        past = self.cache.past()

        def output(x: Tensor, t: float, s: float) -> Tensor:
            now, target = (
                torch.full((self.rows,), time, dtype=torch.float64, device=x.device) for time in (t, s)
            )
            return self.model.refine(stream, {name: x}, now, told_target(now, target), attend, past)[name]

        return output
