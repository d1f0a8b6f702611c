"""Spans -> the tokens of the two streams: the integers of the mask rule, labels and instances.

Training packs whole documents through this, sampling appends spans to its cache through it, so that both mean the same
by rank, block and position.
"""

from collections.abc import Hashable, Mapping, Sequence
from functools import cached_property
from typing import Generic, NamedTuple, TypeVar

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

N = TypeVar("N", int, np.ndarray)


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
        self._context = _Runs(rows, context_length, self.names, channels)
        self._state = _Runs(rows, state_length, self.names, channels)
        self.first_group = first_group
        self.grouping = grouping
        self.block = first_block
        self._instances: list[tuple[int, int]] = []
        self._contexts: list[int] = []  # of each instance
        self._read: tuple[Hashable, ...] = ()  # what the document has in its context so far
        self._numbers: dict[Hashable, int] = {}  # of what has been read
        self._row = self._document = self._rank = self._first = 0
        self._written: list[Document] = []

    def begin(self, row: int, document: int, rank: int = 0) -> None:
        """What is added next continues `document` in `row`, from `rank` on."""
        self._row, self._document, self._rank = row, document, rank
        self._read = ()
        self._first = self._context.used[row]

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

    def _add_ids(self, span: Span, ids: np.ndarray) -> None:
        num = len(span)
        begins = self._context.used[self._row] == self._first
        assert not (span.predicted and begins), "the first token of a document has nothing to predict it"
        self._context.ids.append(ids)
        self._add(self._context, span, slice(None), num, step=1)
        self._read = (*self._read, ids.tobytes())
        self.block += num
        self._rank += num

    def _add_values(self, span: Span, values: Tensor) -> None:
        whole = not self.grouping.within or span.copies % self.grouping.particles == 0
        assert whole, f"{span.copies} copies are no whole groups within a block"
        num_clean = len(span.clean_blocks)
        start = 0
        for number, length in enumerate(span.blocks):
            part = slice(start, start + length)
            context = self._numbers.setdefault(self._read, len(self._numbers))
            if number < num_clean:
                assert span.committed is not None, "a clean copy that is read has been committed"
                self._context.values[span.modality].append(span.committed[part].cpu())
                self._add(self._context, span, part, length)
                self._read = (*self._read, self.block)  # nobody else's
                self.block += 1
            for _ in range(span.copies if span.predicted else 0):
                # a view of the whole would take as long as all the rest of this
                own = values if len(span.blocks) == 1 else values[part]
                self._state.values[span.modality].append(own.cpu())
                self._add(self._state, span, part, length, instance=len(self._instances))
                self._instances.append((self.names.index(span.modality), length))
                self._contexts.append(context)
                self.block += 1
            start += length
            self._rank += 1

    def _add(
        self, runs: "_Runs", span: Span, part: slice, length: int, step: int = 0, instance: int = 0
    ) -> None:
        kind, place = self.names.index(span.modality), runs.take(self._row, length)
        run = _Run(
            place, length, kind, self._document, self.block, self._rank, step, instance, span.predicted
        )
        runs.runs.append(run)
        runs.positions.append(span.positions[part])

    def context(self) -> Stream:
        """The clean tokens of what was added."""
        return self._context.stream(public=True)

    def state(self) -> Stream:
        """The noisy tokens of what was added."""
        return self._state.stream(public=False)

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
        return PackedBatch(self.context(), self.state(), self._context.labels(), instances, keys, sources)


class _Run(NamedTuple, Generic[N]):
    """Tokens of one stream that are added together and stand beside each other, in numbers; or numbers of every token,
    each in an array.
    """

    place: N
    """of the first, in the flattened rows"""
    length: N
    modality: N
    document: N
    block: N
    """of the first; each further one's is `step` more, and so is its rank"""
    rank: N
    step: N
    instance: N
    predicted: N


class _Runs:
    """What is added to one stream. It is kept as it comes and becomes tensors at once: a few operations on all tokens
    take less time than many on a few.
    """

    def __init__(self, rows: int, length: int, names: Sequence[str], channels: Mapping[str, int]) -> None:
        self.shape = rows, length
        self.names = names
        self.channels = channels
        self.used = [0] * rows
        self.runs: list[_Run[int]] = []
        self.positions: list[np.ndarray] = []
        self.ids: list[np.ndarray] = []
        self.values: dict[str, list[Tensor]] = {name: [] for name in channels}

    def take(self, row: int, length: int) -> int:
        """The place of the next `length` tokens of a row."""
        start = self.used[row]
        assert "_tokens" not in vars(self), "nothing is added once the stream was asked for"
        assert start + length <= self.shape[1], f"row {row} has no room for {length} tokens more"
        self.used[row] += length
        return row * self.shape[1] + start

    @cached_property
    def _tokens(self) -> tuple[_Run[np.ndarray], np.ndarray]:
        """The numbers of every token, and whether it has an id; in the order of adding. Nothing is added afterwards."""
        runs = _Run(*np.array(self.runs, dtype=np.int64).reshape(-1, len(_Run._fields)).T)
        each = _Run(*(numbers.repeat(runs.length) for numbers in runs))
        index = np.arange(len(each.place)) - (runs.length.cumsum() - runs.length).repeat(runs.length)
        further = each.step * index
        own = each._replace(place=each.place + index, block=each.block + further, rank=each.rank + further)
        return own, each.step > 0

    def stream(self, public: bool) -> Stream:
        """All that was added."""
        tokens, discrete = self._tokens
        values = {}
        for name, dim in self.channels.items():
            # not numpy's zeros: by how a matrix is aligned in memory, products of it differ in their last bits
            values[name] = torch.zeros(*self.shape, dim)
            if self.values[name]:
                own = tokens.place[(tokens.modality == self.names.index(name)) & ~discrete]
                parts = torch.cat(self.values[name]).float()
                values[name].view(-1, dim).index_copy_(0, torch.from_numpy(own), parts)
        positions = np.zeros((*self.shape, 3), dtype=np.int64)
        positions.reshape(-1, 3)[tokens.place] = np.concatenate([positions[0, :0], *self.positions])
        layout = Layout(
            self._filled(PAD, tokens.document),
            self._filled(PAD, tokens.block),
            self._filled(0, tokens.rank),
            self._filled(False, public),
        )
        ids = self._filled(0, self._ids, tokens.place[discrete])
        kinds, instances = self._filled(PAD, tokens.modality), self._filled(0, tokens.instance)
        return Stream(kinds, ids, values, torch.from_numpy(positions), layout, instances)

    def labels(self) -> Int[Tensor, "B L"]:
        """The id that each token is to predict: that of the next, where it is to be predicted."""
        tokens, discrete = self._tokens
        predicted = tokens.predicted[discrete] > 0
        return self._filled(NO_LABEL, self._ids[predicted], tokens.place[discrete][predicted] - 1)

    @cached_property
    def _ids(self) -> np.ndarray:
        return np.concatenate([np.zeros(0, dtype=np.int64), *self.ids])

    def _filled(
        self, padding: int | bool, values: np.ndarray | bool, place: np.ndarray | None = None
    ) -> Tensor:
        """[B, L]: `values` at `place` (None: where tokens are), `padding` elsewhere."""
        found = np.full(self.shape, padding)
        found.reshape(-1)[self._tokens[0].place if place is None else place] = values
        return torch.from_numpy(found)


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
