"""Spans -> the tokens of the two streams: the integers of the mask rule, labels and instances.

Training packs whole documents through this, sampling appends spans to its cache through it, so that both mean the same
by rank, block and position.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mmgen.modalities.base import Modality
from mmgen.sequence import NO_LABEL, PAD, UNGROUPED, Grouping, Instances, Layout, PackedBatch, Span, Stream


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
        self.first_group = first_group
        self.grouping = grouping
        self.block = first_block
        self._instances: list[tuple[int, int]] = []
        self._used = [[0, 0] for _ in range(rows)]
        self._row = self._document = self._rank = self._first = 0

    def begin(self, row: int, document: int, rank: int = 0) -> None:
        """What is added next continues `document` in `row`, from `rank` on."""
        self._row, self._document, self._rank = row, document, rank
        self._first = self._used[row][0]

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
        index = torch.arange(len(span))
        self.context.ids[self._row, here] = ids
        if span.predicted:
            assert here.start > self._first, "the first token of a document has nothing to predict it"
            self.labels[self._row, here.start - 1 : here.stop - 1] = ids
        self._write(self.context, here, span.modality, span.positions, self.block + index, self._rank + index)
        self.block += len(span)
        self._rank += len(span)

    def _add_values(self, span: Span, values: Tensor) -> None:
        whole = not self.grouping.within or span.copies % self.grouping.particles == 0
        assert whole, f"{span.copies} copies are no whole groups within a block"
        start = 0
        for number, length in enumerate(span.blocks):
            part = slice(start, start + length)
            if number < len(_clean_blocks(span)):
                assert span.committed is not None, "a clean copy that is read has been committed"
                self._add_block(self.context, self._take(0, length), span, span.committed[part], part)
            for _ in range(span.copies if span.predicted else 0):
                here = self._take(1, length)
                assert self.state.instance is not None
                self.state.instance[self._row, here] = len(self._instances)
                self._instances.append((self.names.index(span.modality), length))
                self._add_block(self.state, here, span, values[part], part)
            start += length
            self._rank += 1

    def _add_block(self, stream: Stream, here: slice, span: Span, values: Tensor, part: slice) -> None:
        stream.values[span.modality][self._row, here] = values
        self._write(stream, here, span.modality, span.positions[part], self.block, self._rank)
        self.block += 1

    def _take(self, stream: int, length: int) -> slice:
        start = self._used[self._row][stream]
        self._used[self._row][stream] += length
        return slice(start, start + length)

    def _write(
        self,
        stream: Stream,
        here: slice,
        modality: str,
        positions: Tensor,
        block: Tensor | int,
        rank: Tensor | int,
    ) -> None:
        stream.modality[self._row, here] = self.names.index(modality)
        stream.positions[self._row, here] = positions
        stream.layout.document[self._row, here] = self._document
        stream.layout.block[self._row, here] = block
        stream.layout.rank[self._row, here] = rank
        stream.layout.public[self._row, here] = stream is self.context

    def finish(self, num_documents: int) -> PackedBatch:
        if self._instances:
            modality, tokens = zip(*self._instances, strict=True)
            group, particle = _form_groups(self._instances, self.grouping)
        else:  # one that nobody belongs to, so that an empty state stream still has a time to look up
            modality, tokens, group, particle = [PAD], [0], [0], [0]
        instances = Instances(
            modality=torch.tensor(modality),
            group=torch.tensor(group) + self.first_group,
            particle=torch.tensor(particle),
            num_tokens=torch.tensor(tokens),
        )
        return PackedBatch(self.context, self.state, self.labels, instances, num_documents)


def _form_groups(shapes: Sequence[tuple[int, int]], grouping: Grouping) -> tuple[list[int], list[int]]:
    """The group and the particle of each instance, given their shapes in the order of writing.

    Copies of one block follow each other. Dealing them out in turns puts them into different groups, or spreads them
    evenly where there are fewer groups than copies. Groups are numbered by their first instance.
    """
    particles = grouping.particles
    totals = Counter(shapes)
    assert not any(total % particles for total in totals.values()), (
        f"no whole groups of {particles}: {totals}"
    )
    seen: Counter[tuple[int, int]] = Counter()
    numbers: dict[tuple[tuple[int, int], int], int] = {}
    groups, places = [], []
    for shape in shapes:
        if grouping.within:
            group, particle = divmod(seen[shape], particles)
        else:
            particle, group = divmod(seen[shape], totals[shape] // particles)
        seen[shape] += 1
        groups.append(numbers.setdefault((shape, group), len(numbers)))
        places.append(particle)
    return groups, places


def _empty_stream(rows: int, length: int, channels: Mapping[str, int]) -> Stream:
    def full(value: int) -> Tensor:
        return torch.full((rows, length), value)

    layout = Layout(full(PAD), full(PAD), full(0), torch.zeros(rows, length, dtype=torch.bool))
    values = {name: torch.zeros(rows, length, dim) for name, dim in channels.items()}
    return Stream(full(PAD), full(0), values, torch.zeros(rows, length, 3, dtype=torch.long), layout, full(0))
