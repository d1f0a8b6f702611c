"""A session: rows of half-finished documents over one model, with their key/value cache.

The two verbs of the design, batched over requests: `read` expands (what it reads is committed and never revised),
`output` refines (it reads the cache and writes nothing). Rows may have read different numbers of tokens: padding is a
token of no document, which the mask rule hides.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

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


class Layer:
    """One block's keys and values, in tensors [rows, capacity, K, E] that the first to be written allocate."""

    def __init__(self, cache: "Cache") -> None:
        self.cache = cache
        self.kv: KeyValue | None = None

    def extend(self, k: Float[Tensor, "R L K E"], v: Float[Tensor, "R L K E"]) -> KeyValue:
        """Writes those of the tokens that the cache has made room for; returns all that it holds."""
        if self.kv is None:
            # a head's keys side by side in memory, as its query takes them
            num_heads, dim = k.shape[2:]
            shape = len(k), num_heads, self.cache.capacity, dim
            self.kv = k.new_zeros(shape).transpose(1, 2), v.new_zeros(shape).transpose(1, 2)
        for own, new in zip(self.kv, (k, v), strict=True):
            self.cache.write(own, new)
        return self.past

    @property
    def past(self) -> KeyValue:
        assert self.kv is not None, "something was read"
        k, v = self.kv
        return k[:, : self.cache.length], v[:, : self.cache.length]


class Cache:
    """Keys and values of what was read, written in place into tensors that are allocated once, and their layout.

    Each row's tokens stand together from the left: `lengths` of them, of `length` at most.
    """

    def __init__(self, rows: int, capacity: int, num_layers: int, device: torch.device) -> None:
        self.capacity = capacity
        self.lengths = [0] * rows
        self.layers = [Layer(self) for _ in range(num_layers)]
        self._place: tuple[Any, ...] = ()  # where what is read now stands, and which of it is of a document
        self._taken: tuple[Any, ...] = ()
        pad = torch.full((rows, capacity), PAD, device=device)
        public = torch.zeros(rows, capacity, dtype=torch.bool, device=device)
        self._layout = Layout(pad, pad.clone(), pad.clone(), public)

    @property
    def length(self) -> int:
        return max(self.lengths)

    @property
    def layout(self) -> Layout:
        return self._layout.take((slice(None), slice(self.length)))

    def make_room(self, layout: Layout, num_tokens: Sequence[int]) -> None:
        """Appends the layout of new tokens, the first `num_tokens` of each row; the rest is padding.

        The layers' `extend` then writes their keys and values. Padding is not kept, and there may be nothing that it
        reads: what comes of it is not to be used.
        """
        first, longest = self.lengths, layout.shape[1]
        self.lengths = [held + num for held, num in zip(first, num_tokens, strict=True)]
        assert self.length <= self.capacity, "a cache is made large enough for its plan"
        if len({*first}) == 1 and min(num_tokens) == longest:
            # no row is apart from the others: a copy of whole rows
            self._place, self._taken = (slice(None), slice(first[0], self.length)), (slice(None),)
        else:
            new = [(row, i) for row, num in enumerate(num_tokens) for i in range(num)]
            places = [(row, first[row] + i) for row, i in new]
            index = torch.tensor([new, places], dtype=torch.long, device=layout.document.device)
            self._taken, self._place = (tuple(each.unbind(-1)) for each in index)
        for name in ("document", "block", "rank", "public"):
            self.write(getattr(self._layout, name), getattr(layout, name))

    def write(self, own: Tensor, new: Tensor) -> None:
        """Into a tensor [rows, capacity, ...] what is new in one [rows, L, ...]."""
        own[self._place] = new[self._taken]

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forgets what each row has beyond its new length."""
        for row, (new, old) in enumerate(zip(lengths, self.lengths, strict=True)):
            if new < old:
                self._layout.document[row, new:old] = PAD
        self.lengths = list(lengths)

    def past(self) -> list[KeyValue]:
        return [layer.past for layer in self.layers]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for layer in self.layers for tensor in layer.kv or ())


class Session:
    """Rows of documents that grow. `capacity` bounds the tokens that a row can read."""

    def __init__(self, model: Model, modalities: Mapping[str, Modality], rows: int, capacity: int) -> None:
        self.model = model
        self.modalities = modalities
        self.device = next(model.parameters()).device
        self.cache = Cache(rows, capacity, model.config.num_layers, self.device)
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
        self.cache.make_room(stream.layout, lengths)
        attend = plan_attention(stream.layout, self.cache.layout, "dense")
        return self.model.expand(stream, attend, self.cache.layers)[0]

    def forget(self, num_tokens: Sequence[int]) -> None:
        """Takes back the last tokens of each row; they are of text."""
        for row, num in enumerate(num_tokens):
            self.ranks[row] -= num
            self.positions[row] -= num
        held = self.cache.lengths
        self.cache.truncate([length - num for length, num in zip(held, num_tokens, strict=True)])

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
