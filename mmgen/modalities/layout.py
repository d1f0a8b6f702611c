"""Spans -> the tokens of the two streams: the integers of the mask rule, labels and instances.

Training packs whole documents through this, sampling appends spans to its cache through it, so that both mean the same
by rank, block and position.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from mmgen.modalities.base import Modality
from mmgen.sequence import (
    NO_LABEL,
    PAD,
    UNGROUPED,
    Document,
    Grouping,
    Instances,
    Layout,
    PackedBatch,
    Span,
    Stream,
)


def span_lengths(span: Span) -> tuple[int, int]:
    """Tokens that a span takes of the context stream and of the state stream."""
    if span.values is None:
        return len(span), 0
    return sum(_clean_blocks(span)), span.copies * len(span) if span.predicted else 0


def _clean_blocks(span: Span) -> tuple[int, ...]:
    """Blocks of a continuous span that a later token reads: all if a later span does, else all but the last."""
    if span.read:
        return span.blocks
    return span.blocks[:-1]


class BatchWriter:
    """Writes spans into a batch of `rows`, each row's documents in reading order (which is rank order)."""

    def __init__(
        self,
        rows: int,
        context_length: int,
        state_length: int,
        modalities: Mapping[str, Modality],
        first_group: int = 0,
        first_block: int = 0,
        grouping: Grouping = UNGROUPED,
    ) -> None:
        self.names = list(modalities)
        channels = {name: modality.channels for name, modality in modalities.items() if modality.channels}
        self.context = _empty_stream(rows, context_length, channels)
        self.state = _empty_stream(rows, state_length, channels)
        self.labels = torch.full((rows, context_length), NO_LABEL)
        self._context, self._state = _Integers.of(self.context), _Integers.of(self.state)
        self._labels = self.labels.numpy()
        self.first_group = first_group
        self.grouping = grouping
        self.block = first_block
        self._instances: list[tuple[int, int]] = []
        self._contexts: list[int] = []  # of each instance
        self._read: tuple[Hashable, ...] = ()  # what the document has in its context so far
        self._numbers: dict[Hashable, int] = {}  # of what has been read
        self._used = [[0, 0] for _ in range(rows)]
        self._row = self._document = self._rank = self._first = 0
        self._written: list[Document] = []

    def begin(self, row: int, document: int, rank: int = 0) -> None:
        """What is added next continues `document` in `row`, from `rank` on."""
        self._row, self._document, self._rank = row, document, rank
        self._read = ()
        self._first = self._used[row][0]

    def write(self, row: int, document: Document) -> None:
        """Append a whole document to `row`; documents are numbered as they come."""
        self.begin(row, len(self._written))
        for span in document.spans:
            self.add(span)
        self._written.append(document)

    def add(self, span: Span) -> int:
        """Append a span; returns the rank of what follows it."""
        if span.ids is not None:
            self._add_ids(span, span.ids)
        else:
            assert span.values is not None
            self._add_values(span, span.values)
        return self._rank

    def _add_ids(self, span: Span, ids: Tensor) -> None:
        here = self._take(0, len(span))
        index = np.arange(len(span))
        numbers = ids.numpy()
        self._context.ids[self._row, here] = numbers
        if span.predicted:
            assert here.start > self._first, "the first token of a document has nothing to predict it"
            self._labels[self._row, here.start - 1 : here.stop - 1] = numbers
        self._write(self._context, here, span, slice(None), self.block + index, self._rank + index)
        self._read = (*self._read, numbers.tobytes())
        self.block += len(span)
        self._rank += len(span)

    def _add_values(self, span: Span, values: Tensor) -> None:
        whole = not self.grouping.within or span.copies % self.grouping.particles == 0
        assert whole, f"{span.copies} copies are no whole groups within a block"
        start = 0
        for number, length in enumerate(span.blocks):
            part = slice(start, start + length)
            context = self._numbers.setdefault(self._read, len(self._numbers))
            if number < len(_clean_blocks(span)):
                assert span.committed is not None, "a clean copy that is read has been committed"
                here = self._take(0, length)
                self.context.values[span.modality][self._row, here] = span.committed[part]
                self._add_block(self._context, here, span, part)
                self._read = (*self._read, self.block)  # nobody else's
            for _ in range(span.copies if span.predicted else 0):
                here = self._take(1, length)
                self._state.instance[self._row, here] = len(self._instances)
                self._instances.append((self.names.index(span.modality), length))
                self._contexts.append(context)
                self.state.values[span.modality][self._row, here] = values[part]
                self._add_block(self._state, here, span, part)
            start += length
            self._rank += 1

    def _add_block(self, stream: "_Integers", here: slice, span: Span, part: slice) -> None:
        self._write(stream, here, span, part, self.block, self._rank)
        self.block += 1

    def _take(self, stream: int, length: int) -> slice:
        start = self._used[self._row][stream]
        self._used[self._row][stream] += length
        return slice(start, start + length)

    def _write(
        self,
        stream: "_Integers",
        here: slice,
        span: Span,
        part: slice,
        block: np.ndarray | int,
        rank: np.ndarray | int,
    ) -> None:
        place = self._row, here
        stream.modality[place] = self.names.index(span.modality)
        stream.positions[place] = span.positions.numpy()[part]
        stream.document[place] = self._document
        stream.block[place] = block
        stream.rank[place] = rank
        stream.public[place] = stream is self._context

    def finish(self) -> PackedBatch:
        """The batch of the documents that were written."""
        if self._instances:
            modality, tokens = zip(*self._instances, strict=True)
            contexts = self._contexts
            group, particle = _form_groups(self._instances, contexts, self.grouping)
        else:  # one that nobody belongs to, so that an empty state stream still has a time to look up
            modality, tokens, group, particle, contexts = [PAD], [0], [0], [0], [0]
        instances = Instances(
            modality=torch.tensor(modality),
            group=torch.tensor(group) + self.first_group,
            particle=torch.tensor(particle),
            num_tokens=torch.tensor(tokens),
            context=torch.tensor(contexts),
        )
        keys, sources = tuple(d.key for d in self._written), tuple(d.source for d in self._written)
        return PackedBatch(self.context, self.state, self.labels, instances, keys, sources)


@dataclass(frozen=True)
class _Integers:
    """A stream's integers as arrays over the same memory: a short write costs less so."""

    modality: np.ndarray
    ids: np.ndarray
    positions: np.ndarray
    instance: np.ndarray
    document: np.ndarray
    block: np.ndarray
    rank: np.ndarray
    public: np.ndarray

    @classmethod
    def of(cls, stream: Stream) -> "_Integers":
        assert stream.instance is not None
        tensors = (stream.modality, stream.ids, stream.positions, stream.instance)
        layout = stream.layout
        return cls(
            *(each.numpy() for each in (*tensors, layout.document, layout.block, layout.rank, layout.public))
        )


def text_rows(
    tokens: Int[Tensor, "R L"],
    positions: Int[Tensor, "R"],
    ranks: Int[Tensor, "R"],
    blocks: Int[Tensor, "R"],
    modality: int,
) -> Stream:
    """Tokens of text that go on from a position, a rank and a block in each row: what a BatchWriter makes of such spans
    with row r as document r, in a few operations on the device of `tokens`.

    There are no continuous values, so that nothing is embedded in vain.
    """
    rows, num = tokens.shape
    index = torch.arange(num, device=tokens.device)
    position, rank, block = (first[:, None] + index for first in (positions, ranks, blocks))
    document = torch.arange(rows, device=tokens.device)[:, None].expand(rows, num)
    layout = Layout(document, block, rank, torch.ones_like(tokens, dtype=torch.bool))
    kind = torch.full_like(tokens, modality)
    return Stream(kind, tokens, {}, position[..., None].expand(-1, -1, 3), layout)


def _form_groups(
    shapes: Sequence[tuple[int, int]], contexts: Sequence[int], grouping: Grouping
) -> tuple[list[int], list[int]]:
    """The group and the particle of each instance, given their shapes and contexts in the order of writing.

    Copies of one block follow each other. Dealing them out in turns puts them into different groups, or spreads them
    evenly where there are fewer groups than copies. Groups are numbered by their first instance.
    """
    particles = grouping.particles
    members: dict[Hashable, list[int]] = {}
    for index, shape in enumerate(shapes):
        key = (shape, contexts[index]) if grouping.of == "context" else shape
        members.setdefault(key, []).append(index)
    if grouping.of == "context":
        members = _with_rests(members, shapes, particles)
    place: dict[int, tuple[Hashable, int, int]] = {}
    for key, alike in members.items():
        assert len(alike) % particles == 0, f"no whole groups of {particles}: {len(alike)} of {key}"
        for turn, index in enumerate(alike):
            if grouping.within:
                group, particle = divmod(turn, particles)
            else:
                particle, group = divmod(turn, len(alike) // particles)
            place[index] = key, group, particle
    numbers: dict[tuple[Hashable, int], int] = {}
    groups, places = [], []
    for index in range(len(shapes)):
        key, group, particle = place[index]
        groups.append(numbers.setdefault((key, group), len(numbers)))
        places.append(particle)
    return groups, places


def _with_rests(
    members: Mapping[Hashable, Sequence[int]], shapes: Sequence[tuple[int, int]], particles: int
) -> dict[Hashable, list[int]]:
    """What makes no whole group of one context goes into groups with the rest of others of its shape."""
    found: dict[Hashable, list[int]] = {}
    for key, alike in members.items():
        whole = len(alike) // particles * particles
        if whole:
            found[key] = list(alike[:whole])
        for index in alike[whole:]:
            found.setdefault(shapes[index], []).append(index)
    return found


def _empty_stream(rows: int, length: int, channels: Mapping[str, int]) -> Stream:
    def full(value: int) -> Tensor:
        return torch.full((rows, length), value)

    layout = Layout(full(PAD), full(PAD), full(0), torch.zeros(rows, length, dtype=torch.bool))
    values = {name: torch.zeros(rows, length, dim) for name, dim in channels.items()}
    return Stream(full(PAD), full(0), values, torch.zeros(rows, length, 3, dtype=torch.long), layout, full(0))
