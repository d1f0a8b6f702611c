"""A stream of a source's samples in an endless, keyed order: the sample at a position is a pure function of (seed,
position).

In each epoch a stream reads the parts of shards that it is dealt (see `mmgen/data/deal.py`), in their order, and
shuffles `window` samples at a time. A position is the window (its number in the epoch, and where it begins: which part,
and which sample of its shard) and an index in it, so that resuming re-reads one window and nothing before it. The
streams of a source together hold each of its samples once an epoch.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from mmgen.data.codec import BrokenSample
from mmgen.data.deal import Part, check_deal, deal
from mmgen.data.rejects import Rejects
from mmgen.data.source import Item, SourceConfig, SourceReader
from mmgen.rng import keyed_numpy
from mmgen.sequence import Sample

BARREN = 3  # epochs in a row without a sample for a stream, before that is an error: filters may empty one by chance


@dataclass(frozen=True)
class Position:
    epoch: int = 0
    window: int = 0
    part: int = 0
    first: int = 0
    """number in its shard of the sample from which the window is filled"""
    index: int = 0
    """in the window, shuffled"""


@dataclass(frozen=True)
class _Window:
    start: Position
    items: Sequence[Item]
    """shuffled"""
    end: Position
    """where the next one begins"""

    def holds(self, position: Position) -> bool:
        start = self.start
        same_window = position.window == start.window and position.epoch == start.epoch
        return same_window and position.part == start.part and position.first == start.first


class SampleStream:
    """One of the `streams` of a source. `find` looks for a sample, `at` decodes it, `next` says what follows it.

    Streams of one source may share its `reader`. Raises ValueError where there are more streams than samples.
    """

    def __init__(
        self,
        name: str,
        config: SourceConfig,
        seed: int,
        stream: int = 0,
        streams: int = 1,
        reader: SourceReader | None = None,
    ) -> None:
        assert 0 <= stream < streams, f"stream {stream} of {streams}"
        self.name = name
        self.config = config
        self.seed = seed
        self.stream = stream
        self.streams = streams
        self.reader = reader or SourceReader(config)
        check_deal(self.reader.counts, name, streams)
        self._window: _Window | None = None
        self._reading: Iterator[tuple[int, Item]] = iter(())  # goes on where the window ends
        self._dealt: tuple[int, list[Part]] = 0, self._deal(0)

    @property
    def rejects(self) -> Rejects:
        return self.reader.rejects

    def find(self, position: Position) -> Position:
        """`position`, or the first one after it that holds a sample.

        Raises ValueError where BARREN epochs have none.
        """
        barren = 0
        while barren < BARREN:
            window = self._fill(position)
            if position.index < len(window.items):
                return position
            if window.end.epoch > position.epoch and position == Position(position.epoch):
                barren += 1
            position = window.end
        wanted = f" with {self.config.include}" if self.config.include else ""
        share = f" for each of {self.streams} streams" if self.streams > 1 else ""
        raise ValueError(
            f"source {self.name}: {self.config.path} has no usable sample{wanted}{share}; {self.rejects.summary()}"
        )

    def at(self, position: Position) -> Sample:
        """The sample at a position that `find` returned. Raises BrokenSample."""
        return self.reader.decode(self._fill(position).items[position.index])

    def next(self, position: Position) -> Position:
        """What follows a position that `find` returned (see `find`)."""
        return Position(position.epoch, position.window, position.part, position.first, position.index + 1)

    def epoch(self, epoch: int = 0) -> Iterator[Sample]:
        """The usable samples of one epoch."""
        position = self.find(Position(epoch))
        while position.epoch == epoch:
            with suppress(BrokenSample):  # counted
                yield self.at(position)
            position = self.find(self.next(position))

    def _fill(self, position: Position) -> _Window:
        """The window of a position."""
        if self._window is None or not self._window.holds(position):
            start = replace(position, index=0)
            if self._window is None or self._window.end != start or not start.window:
                self._reading = self._items(start)
            items = []
            end = Position(start.epoch + 1)
            for part, item in self._reading:
                items.append(item)
                if len(items) == self.config.window:
                    end = Position(start.epoch, start.window + 1, part, item.place[1] + 1)
                    break
            # by place, so that the order of the shards does not decide anything in a window that holds them all
            items.sort(key=lambda item: item.place)
            key = self.seed, self.name, "samples", start.epoch, start.window * self.streams + self.stream
            order = keyed_numpy(*key).permutation(len(items))
            self._window = _Window(start, [items[index] for index in order], end)
        return self._window

    def _items(self, start: Position) -> Iterator[tuple[int, Item]]:
        """Samples, each with its part, from a window's start to the end of its epoch."""
        if self._dealt[0] != start.epoch:
            self._dealt = start.epoch, self._deal(start.epoch)
        epoch, parts = self._dealt

        def is_drawn(key: str, metadata: Mapping[str, Any]) -> bool:
            return self._is_drawn(key, metadata, epoch)

        for index in range(start.part, len(parts)):
            first = start.first if index == start.part else 0
            for item in self.reader.read(parts[index], first, is_drawn):
                yield index, item

    def _deal(self, epoch: int) -> list[Part]:
        return deal(self.reader.counts, self.name, self.seed, epoch, self.stream, self.streams)

    def _is_drawn(self, key: str, metadata: Mapping[str, Any], epoch: int) -> bool:
        for name, share in self.config.thin.items():
            if metadata.get(name):
                if keyed_numpy(self.seed, self.name, "thin", epoch, key).random() >= share:
                    return False
        return True


def check_weights(sources: Mapping[str, SourceConfig]) -> None:
    """Raises ValueError where there is no source to draw from."""
    if not sources:
        raise ValueError("data.sources is empty: name at least one, for example {emoji: {path: FOLDER}}")
