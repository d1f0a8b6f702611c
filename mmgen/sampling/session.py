"""A session: rows of half-finished documents over one model, with their key/value cache.

The two verbs of the design, batched over requests: `read` expands (what it reads is committed and never revised),
`output` refines (it reads the cache and writes nothing). Rows may have read different numbers of tokens: padding is a
token of no document, which the mask rule hides.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
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
    """Keys and values of what was read, in tensors allocated once [rows, capacity, K, E], and their layout."""

    def __init__(self, rows: int, capacity: int, device: torch.device) -> None:
        self.rows = rows
        self.capacity = capacity
        self.length = 0
        self.kvs: list[KeyValue] = []
        pad = torch.full((rows, 0), PAD, device=device)
        self.layout = Layout(pad, pad, pad, torch.zeros(rows, 0, dtype=torch.bool, device=device))

    def append(self, kvs: Sequence[KeyValue], layout: Layout) -> None:
        count = layout.shape[1]
        assert self.length + count <= self.capacity, "a cache is made large enough for its plan"
        if not self.kvs:
            shape = (self.rows, self.capacity, *kvs[0][0].shape[2:])
            self.kvs = [(k.new_zeros(shape), v.new_zeros(shape)) for k, v in kvs]
        here = slice(self.length, self.length + count)
        for (keys, values), (k, v) in zip(self.kvs, kvs, strict=True):
            keys[:, here] = k
            values[:, here] = v
        self.length += count
        self.layout = Layout.concat([self.layout, layout])

    def past(self) -> list[KeyValue]:
        return [(k[:, : self.length], v[:, : self.length]) for k, v in self.kvs]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for pair in self.kvs for tensor in pair)


class Session:
    """Rows of documents that grow. `capacity` bounds the tokens that a row can read, padding included."""

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
