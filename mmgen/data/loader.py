"""Samples -> batches, with a state after each batch from which the next one follows bit for bit.

Every draw is keyed by the number of the sample, so the state is a few counters: where each source stands, how many
samples and groups were drawn, and which documents wait: for a row with room, or for others with which their noisy
copies make whole groups.

Several loaders share a run's data, one for each of its streams, and take turns: batch n is of stream n mod streams.
Each is a pure function of its own state, so that it does not matter which process makes it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

from torch import Tensor

from mmgen.data.compose import ComposeConfig, check_tasks, compose
from mmgen.data.pack import PackConfig, Packer
from mmgen.data.streams import Position, SampleStream, ShardReader, SourceConfig, check_weights
from mmgen.data.units import Units, fill_groups
from mmgen.modalities import MissingPart, Modality
from mmgen.rng import draw_index, keyed_numpy
from mmgen.sequence import UNGROUPED, Document, Grouping, PackedBatch

N = TypeVar("N", int, Tensor)

LOOKAHEAD = 16  # documents that may wait for room before a batch is closed
USELESS = 1000  # samples in a row of which none can be placed, before that is an error
UNMATCHED = 16  # documents, times the particles of a group, that may wait for others of their kind


@dataclass(frozen=True)
class DataConfig:
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    compose: ComposeConfig = field(default_factory=ComposeConfig)
    pack: PackConfig = field(default_factory=PackConfig)
    streams: int = 1
    """parts of the data that are read and packed apart and take turns; so many processes at most can make batches"""

    def __post_init__(self) -> None:
        if self.streams < 1:
            raise ValueError(f"streams {self.streams} must be at least 1")


@dataclass(frozen=True)
class Drawn:
    """One sample's place in the training order: its number, of all streams, source and position. Its document follows.

    `alone` documents found no others of their kind and fill their groups with further copies of their own.
    """

    number: int
    source: str
    position: Position
    alone: bool = False


class Loader:
    """Iterates over (batch, state) of one stream; `load_state` continues after the batch that a state came with.

    A document whose copies are no whole groups waits for others like it. Where more than UNMATCHED per particle wait,
    the one whose kind waited longest fills its groups by itself: nothing is lost, and what waits does not grow.
    """

    def __init__(
        self,
        config: DataConfig,
        modalities: Mapping[str, Modality],
        seed: int,
        grouping: Grouping = UNGROUPED,
        stream: int = 0,
        readers: Mapping[str, ShardReader] | None = None,
    ) -> None:
        check_weights(config.sources)
        check_tasks(config.compose, modalities)
        self.config = config
        self.modalities = modalities
        self.seed = seed
        self.grouping = grouping
        self.stream = stream
        readers = readers or {name: ShardReader(source) for name, source in config.sources.items()}
        self.streams = {
            name: SampleStream(name, source, seed, stream, config.streams, readers[name])
            for name, source in config.sources.items()
        }
        self._weights = [source.weight for source in config.sources.values()]
        self._names = list(config.sources)
        self.positions = {name: stream.begin() for name, stream in self.streams.items()}
        self.num_drawn = 0
        self.num_groups = 0
        self.waiting: list[Drawn] = []
        self._composed: dict[int, Document] = {}  # of those that wait; made again after a resume
        # samples of no use, counted once however often they are drawn
        self._dropped: set[tuple[str, str]] = set()
        self._num_useless = 0  # since one was placed
        self._num_alone = 0

    def state(self) -> dict[str, Any]:
        """What `load_state` needs, as JSON."""
        return {
            "positions": {name: asdict(position) for name, position in self.positions.items()},
            "num_drawn": self.num_drawn,
            "num_groups": self.num_groups,
            "waiting": [asdict(drawn) for drawn in self.waiting],
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`. Raises ValueError where its sources are not this run's."""
        if sorted(state["positions"]) != sorted(self.positions):
            raise ValueError(
                f"the checkpoint was trained on sources {sorted(state['positions'])}, "
                f"this run has {sorted(self.positions)}"
            )
        self.positions = {name: Position(**position) for name, position in state["positions"].items()}
        self.num_drawn = state["num_drawn"]
        self.num_groups = state["num_groups"]
        self.waiting = [
            Drawn(**{**item, "position": Position(**item["position"])}) for item in state["waiting"]
        ]

    def __iter__(self) -> Iterator[tuple[PackedBatch, dict[str, Any]]]:
        while True:
            yield self._next_batch(), self.state()

    def _next_batch(self) -> PackedBatch:
        packer = Packer(self.config.pack, self.modalities, self.grouping)
        units: Units[Drawn] = Units(self.grouping)
        # All that waited is offered anew, in its order: a resumed run, which knows no more, does the same.
        old, self.waiting = self.waiting, []
        for drawn in old:
            document = self._composed.pop(drawn.number, None) or self._document(drawn)
            assert document is not None, "a document that waits was composed before"
            self._offer(packer, units, drawn, document)
        while len(self.waiting) < LOOKAHEAD:
            drawn = self._draw()
            document = self._document(drawn)
            if document is None:
                continue
            if not packer.fits_empty(document):
                self._drop(drawn, "longer than a row of the batch")
            else:
                self._offer(packer, units, drawn, document)
        self._wait(units.waiting())
        batch = packer.finish(self.num_groups)
        self.num_groups += batch.instances.num_groups
        return replace(batch, instances=replace(batch.instances, group=self._number(batch.instances.group)))

    def _number(self, own: N) -> N:
        """The number among those of all streams of this one's sample or group `own`."""
        return own * self.config.streams + self.stream

    def _offer(self, packer: Packer, units: Units[Drawn], drawn: Drawn, document: Document) -> None:
        """Place the document and those that waited for it, or let them wait for room; or let it wait for others."""
        unit = units.offer(drawn, document)
        if not unit:
            if len(units) > UNMATCHED * self.grouping.particles:
                self._place_alone(packer, *units.pop_oldest())
        elif packer.fits_empty(*(each for _, each in unit)):
            self._place(packer, unit)
        else:  # never room for all of them at once
            for entry in unit:
                self._place_alone(packer, *entry)

    def _place_alone(self, packer: Packer, drawn: Drawn, document: Document) -> None:
        document = fill_groups(document, self.grouping)
        if not packer.fits_empty(document):
            self._drop(drawn, f"no room in a batch for a group of {self.grouping.particles}")
            return
        self._num_alone += 1
        self._place(packer, [(replace(drawn, alone=True), document)])

    def _place(self, packer: Packer, unit: Sequence[tuple[Drawn, Document]]) -> None:
        self._num_useless = 0
        if not packer.add(*(document for _, document in unit)):
            self._wait(unit)

    def _wait(self, entries: Sequence[tuple[Drawn, Document]]) -> None:
        for drawn, document in entries:
            self.waiting.append(drawn)
            self._composed[drawn.number] = document

    def _draw(self) -> Drawn:
        number = self._number(self.num_drawn)
        name = self._names[0]
        if len(self._names) > 1:
            name = self._names[draw_index(self._weights, keyed_numpy(self.seed, "source", number))]
        position = self.streams[name].find(self.positions[name])
        self.positions[name] = self.streams[name].next(position)
        self.num_drawn += 1
        return Drawn(number, name, position)

    def _document(self, drawn: Drawn) -> Document | None:
        sample = self.streams[drawn.source].at(drawn.position)
        try:
            document = compose(
                sample, self.config.compose, self.modalities, keyed_numpy(self.seed, "compose", drawn.number)
            )
        except MissingPart as missing:
            self._drop(drawn, missing.reason)
            return None
        return fill_groups(document, self.grouping) if drawn.alone else document

    def _drop(self, drawn: Drawn, reason: str) -> None:
        stream = self.streams[drawn.source]
        sample = stream.at(drawn.position)
        if (sample.shard, sample.key) not in self._dropped:
            self._dropped.add((sample.shard, sample.key))
            stream.rejects.drop(reason, f"{sample.shard}: {sample.key}")
        self._num_useless += 1
        if self._num_useless >= USELESS:
            raise ValueError(f"of the last {USELESS} samples none can be used: {self.remarks()}")

    def remarks(self) -> str:
        """One line on what was of no use so far, and what filled a group by itself; empty where there is nothing."""
        rejects = {name: stream.rejects for name, stream in self.streams.items()}
        found = [f"{name}: {r.summary()}" for name, r in rejects.items() if r.samples or r.shards]
        if self._num_alone:
            found.append(
                f"{self._num_alone} documents filled groups by themselves, for want of others of their shape"
            )
        return "; ".join(found)


def build_loaders(
    config: DataConfig, modalities: Mapping[str, Modality], seed: int, grouping: Grouping = UNGROUPED
) -> list[Loader]:
    """A loader for each stream of the data; what one of them decodes, the others of its process need not."""
    readers = {name: ShardReader(source) for name, source in config.sources.items()}
    return [Loader(config, modalities, seed, grouping, stream, readers) for stream in range(config.streams)]
