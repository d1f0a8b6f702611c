"""A session: rows of half-finished documents over one model, with their key/value cache.

The two verbs of the design, batched over requests: `read` expands (what it reads is committed and never revised),
`outputs` refines (it reads the cache and commits nothing). Rows may have read different numbers of tokens: padding is a
token of no document, which the mask rule hides.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
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
        for own, new in zip(self.tensors(k), (k, v), strict=True):
            self.cache.write(own, new)
        return self.past

    def tensors(self, like: Float[Tensor, "B L K E"]) -> KeyValue:
        """Those of all rows, made when first asked for, of heads and numbers as `like` has them."""
        if self.kv is None:
            # a head's keys side by side in memory, as its query takes them
            num_heads, dim = like.shape[2:]
            shape = len(self.cache.lengths), num_heads, self.cache.capacity, dim
            self.kv = like.new_zeros(shape).transpose(1, 2), like.new_zeros(shape).transpose(1, 2)
        return self.kv

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

    def beside(self) -> "Cache":
        """The same keys and values, for tokens that are appended behind the longest row and not kept."""
        other = Cache(len(self.lengths), self.capacity, len(self.layers), self._layout.document.device)
        for name in ("document", "block", "rank", "public"):
            getattr(other._layout, name)[:, : self.length] = getattr(self.layout, name)
        for own, layer in zip(other.layers, self.layers, strict=True):
            own.kv = layer.kv
        other.lengths = [self.length] * len(self.lengths)
        return other

    @staticmethod
    def stack(caches: Sequence["Cache"], room: int) -> "Cache":
        """The rows of several caches below each other, copied, with room for so many tokens more.

        Rows are filled up with padding, so that new tokens stand in the same columns of all.
        """
        held = max(cache.length for cache in caches)
        rows = [cache.layout.shape[0] for cache in caches]
        stacked = Cache(sum(rows), held + room, len(caches[0].layers), caches[0].layout.document.device)
        start = 0
        for cache, num in zip(caches, rows, strict=True):
            place = slice(start, start + num), slice(0, cache.length)
            for name in ("document", "block", "rank", "public"):
                getattr(stacked._layout, name)[place] = getattr(cache.layout, name)
            for into, layer in zip(stacked.layers, cache.layers, strict=True):
                for own, past in zip(into.tensors(layer.past[0]), layer.past, strict=True):
                    own[place] = past
            start += num
        stacked.lengths = [held] * sum(rows)
        return stacked

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
        self.next_block = 0

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
        writer = BatchWriter(self.rows, max(lengths), 0, self.modalities, first_block=self.next_block)
        for row, items in enumerate(spans):
            writer.begin(row, document=row, rank=self.ranks[row])
            for span in items:
                self.ranks[row] = writer.add(span)
                self.positions[row] = span.next_position
        self.next_block = writer.block
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
        outputs = self.outputs([spans], told_target)
        return lambda x, t, s: outputs(x, t, s, 1)[0]

    def outputs(
        self, spans: Sequence[Sequence[Span]], told_target: ToldTarget, others: Sequence["Session"] = ()
    ) -> "Refinement":
        """`output` given what this session has read, and given what each of the others has, all in one call.

        `spans` has those of every session. The keys and values of what was read are copied at the first call, but for
        those of this session alone where it has room for the noisy tokens behind them.
        """
        return Refinement((self, *others), spans, told_target)


class Refinement:
    """`Outputs` of some sessions' rows, which all have the same state. Nothing else may be read while it is in use."""

    def __init__(
        self, sessions: Sequence[Session], spans: Sequence[Sequence[Span]], told_target: ToldTarget
    ) -> None:
        self.sessions = sessions
        self.spans = spans
        self.told_target = told_target
        self._calls: dict[int, _Call] = {}

    def __call__(self, x: Tensor, t: float, s: float, num: int) -> Sequence[Tensor]:
        if num not in self._calls:
            self._calls[num] = _Call(self.sessions[:num], self.spans[:num])
        return self._calls[num](x, t, s, self.told_target)

    @property
    def num_bytes(self) -> int:
        """Of keys and values, beside those that the sessions hold."""
        return sum(call.num_bytes for call in self._calls.values())


class _Call:
    """Noisy spans of all rows of some sessions of a model, in one call: each session's rows have the same state."""

    def __init__(self, sessions: Sequence[Session], spans: Sequence[Sequence[Span]]) -> None:
        first = sessions[0]
        self.model = first.model
        self.num = len(sessions)
        self.name = spans[0][0].modality
        self.rows = sum(session.rows for session in sessions)
        longest = max(map(len, chain.from_iterable(spans)))
        block = max(session.next_block for session in sessions)
        writer = BatchWriter(self.rows, 0, longest, first.modalities, first_block=block)
        row = 0
        for session, own in zip(sessions, spans, strict=True):
            for document, span in enumerate(own):
                writer.begin(row, document, session.ranks[document])
                writer.add(span)
                row += 1
        stream = move(writer.state, first.device)
        assert stream.instance is not None, "state tokens belong to instances"
        # a row is of one instance, whose modulation is then broadcast, not gathered for every token
        self.stream = replace(stream, instance=stream.instance[:, :1])
        # every call writes the state's keys and values over those of the call before
        caches = [session.cache for session in sessions]
        fits = self.num == 1 and caches[0].length + longest <= caches[0].capacity
        self.cache = caches[0].beside() if fits else Cache.stack(caches, longest)
        self.num_bytes = 0 if fits else self.cache.num_bytes
        self.cache.make_room(self.stream.layout, [longest] * self.rows)
        self.attend = plan_attention(self.stream.layout, self.cache.layout, "dense")

    def __call__(self, x: Tensor, t: float, s: float, told_target: ToldTarget) -> Sequence[Tensor]:
        now, target = (
            torch.full((self.rows,), time, dtype=torch.float64, device=x.device) for time in (t, s)
        )
        state = {self.name: torch.cat([x] * self.num)}
        found = self.model.refine(
            self.stream, state, now, told_target(now, target), self.attend, self.cache.layers
        )
        return found[self.name].chunk(self.num)
