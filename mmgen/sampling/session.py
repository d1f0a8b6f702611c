"""A session: rows of half-finished documents over one model, with their key/value cache.

The two verbs of the design, batched over requests: `read` expands (what it reads is committed and never revised),
`outputs` refines (it reads the cache and commits nothing). Rows may have read different numbers of tokens: padding is a
token of no document, which the mask rule hides.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmgen.modalities import Modality
from mmgen.modalities.layout import BatchWriter, text_rows
from mmgen.model.attention import plan_attention
from mmgen.model.model import Model
from mmgen.sampling.cache import Cache
from mmgen.sampling.graphs import Graphs
from mmgen.sampling.loops import Output
from mmgen.sequence import Span, Stream, move

ToldTarget = Callable[[Tensor, Tensor], Tensor]


class Session:
    """Rows of documents that grow. `capacity` bounds the tokens that a row can read.

    With `graphs` its cache is one of theirs, and passes over new text and noisy tokens are their recorded ones.
    """

    def __init__(
        self,
        model: Model,
        modalities: Mapping[str, Modality],
        rows: int,
        capacity: int,
        graphs: Graphs | None = None,
    ) -> None:
        self.model = model
        self.modalities = modalities
        self.device = next(model.parameters()).device
        self.graphs = graphs
        self._place = None if graphs is None else graphs.take(rows, capacity)
        self.cache = (
            Cache(rows, capacity, model.config.num_layers, self.device)
            if self._place is None
            else self._place.cache
        )
        self.rows = rows
        self.ranks = [0] * rows
        self.positions = [0] * rows
        self.next_block = 0

    def read(self, spans: Sequence[Sequence[Span]]) -> Float[Tensor, "R W"]:
        """Expand each row by its spans; an empty list leaves a row as it is.

        Returns the final hidden state of each row's last new token (some token's, for a row that read nothing).
        """
        hidden = self.read_all(spans)
        lengths = [sum(span.lengths[0] for span in row) for row in spans]
        last = torch.tensor(lengths, device=self.device).clamp(min=1) - 1
        return hidden[torch.arange(self.rows, device=self.device), last]

    def read_all(self, spans: Sequence[Sequence[Span]]) -> Float[Tensor, "R L W"]:
        """`read`, returning the final hidden states of all new tokens, each row's from the left."""
        return self._expand(*self._write(spans))

    @staticmethod
    def read_first(sessions: Sequence["Session"], spans: Sequence[Sequence[Sequence[Span]]]) -> None:
        """What each of some sessions of a model reads first, in one pass over all: what stands side by side in a row is
        of documents that do not read each other.
        """
        assert not any(session.cache.length for session in sessions), (
            "keys and values of a cache are a row's own"
        )
        written = [session._write(own) for session, own in zip(sessions, spans, strict=True)]
        joined = Stream.side_by_side([stream for stream, _ in written])
        attend = plan_attention(joined.layout, joined.layout, "dense")
        kvs = sessions[0].model.expand(joined, attend)[1]
        start = 0
        for session, (stream, lengths) in zip(sessions, written, strict=True):
            here = slice(None), slice(start, start + stream.ids.shape[1])
            start = here[1].stop
            session.cache.make_room(stream.layout, lengths)
            for layer, (k, v) in zip(session.cache.layers, kvs, strict=True):
                layer.extend(k[here], v[here])

    def _write(self, spans: Sequence[Sequence[Span]]) -> tuple[Stream, list[int]]:
        """The tokens of each row's spans, and how many they are."""
        lengths = [sum(span.lengths[0] for span in row) for row in spans]
        writer = BatchWriter(self.rows, max(lengths), 0, self.modalities, first_block=self.next_block)
        for row, items in enumerate(spans):
            writer.begin(row, document=row, rank=self.ranks[row])
            for span in items:
                self.ranks[row] = writer.add(span)
                self.positions[row] = span.next_position
        self.next_block = writer.block
        return move(writer.context(), self.device), lengths

    def _expand(self, stream: Stream, lengths: Sequence[int]) -> Float[Tensor, "R L W"]:
        self.cache.make_room(stream.layout, lengths)
        attend = plan_attention(stream.layout, self.cache.layout, "dense")
        return self.model.expand(stream, attend, self.cache.layers)[0]

    def write(self, tokens: Int[Tensor, "R L"]) -> tuple[Float[Tensor, "R L W"], Float[Tensor, "R L V"]]:
        """Expand each row by as many tokens of text: their final hidden states, and logits of what follows each."""
        num = tokens.shape[1]
        blocks = range(self.next_block, self.next_block + self.rows * num, num)
        first = torch.tensor(list(zip(self.positions, self.ranks, blocks, self.cache.lengths, strict=True)))
        for row in range(self.rows):
            self.positions[row] += num
            self.ranks[row] += num
        self.next_block += self.rows * num
        if self.graphs is not None and self._place is not None:
            return self.graphs.text_pass(self._place, num)(tokens, first)
        position, rank, block, _ = first.to(self.device).unbind(-1)
        stream = text_rows(tokens, position, rank, block, self.model.names.index("text"))
        hidden = self._expand(stream, [num] * self.rows)
        return hidden, self.model.logits(hidden)

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
        stream = move(writer.state(), first.device)
        assert stream.instance is not None, "state tokens belong to instances"
        # all rows are at one time: one modulation is made, and broadcast rather than gathered for every token
        self.stream = replace(stream, instance=torch.zeros_like(stream.instance[:1, :1]))
        caches = [session.cache for session in sessions]
        held = max(cache.length for cache in caches)
        if first.graphs is not None:
            place = first.graphs.take(self.rows, held + longest)
            place.cache.fill(caches)
            self.num_bytes = place.cache.num_bytes
            self._refine = first.graphs.noisy_pass(place, self.stream, self.name)
            return
        # every call writes the state's keys and values over those of the call before
        fits = self.num == 1 and held + longest <= caches[0].capacity
        if fits:
            self.cache = caches[0].beside()
        else:
            self.cache = Cache(self.rows, held + longest, len(caches[0].layers), first.device)
            self.cache.fill(caches)
        self.num_bytes = 0 if fits else self.cache.num_bytes
        self.cache.make_room(self.stream.layout, [longest] * self.rows)
        self._attend = plan_attention(self.stream.layout, self.cache.layout, "dense")
        self._refine = self._as_it_is

    def __call__(self, x: Tensor, t: float, s: float, told_target: ToldTarget) -> Sequence[Tensor]:
        now, target = (torch.full((1,), time, dtype=torch.float64, device=x.device) for time in (t, s))
        return self._refine(torch.cat([x] * self.num), now, told_target(now, target)).chunk(self.num)

    def _as_it_is(self, x: Tensor, now: Tensor, told: Tensor) -> Tensor:
        found = self.model.refine(self.stream, {self.name: x}, now, told, self._attend, self.cache.layers)
        return found[self.name]
