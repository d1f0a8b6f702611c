"""Samples -> batches, with a state after each batch from which the next one follows bit for bit.

Every draw is keyed by the number of the sample, so the state is a few counters: where each source stands, how many
samples, groups and tokens of each source were drawn, and which documents wait: for a row with room, or for others with
which their noisy copies make whole groups. It also says what it was counted on, and is refused where that changed.

Several loaders share a run's data, one for each of its streams, and take turns: batch n is of stream n mod streams.
Each is a pure function of its own state, so that it does not matter which process makes it.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import numpy as np
from torch import Tensor

from mmgen.data.codec import BrokenSample
from mmgen.data.compose import ComposeConfig, check_tasks, compose, cut_text
from mmgen.data.mix import Mix, Weighting
from mmgen.data.pack import PackConfig, Packer
from mmgen.data.rejects import summary
from mmgen.data.source import SourceConfig, SourceReader
from mmgen.data.streams import Position, SampleStream, check_weights
from mmgen.data.units import Units, fill_groups
from mmgen.modalities import MissingPart, Modality
from mmgen.rng import keyed_numpy
from mmgen.sequence import UNGROUPED, Document, Grouping, PackedBatch, Sample

N = TypeVar("N", int, Tensor)

USELESS = 1000  # samples in a row of which none can be placed, before that is an error
AT_ONCE = 16  # samples that are decoded before the first of them is composed; more are hardly faster
UNMATCHED = 16  # documents, times the particles of a group, that may wait for others of their kind


@dataclass(frozen=True)
class DataConfig:
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    compose: ComposeConfig = field(default_factory=ComposeConfig)
    pack: PackConfig = field(default_factory=PackConfig)
    streams: int = 1
    """parts of the data that are read and packed apart and take turns; so many processes at most can make batches"""
    weights: Weighting = "documents"
    """what the sources' weights are shares of: documents, or tokens of both streams"""
    too_long: Literal["drop", "split", "stop"] = "drop"
    """what becomes of a document that no row has room for: left out, a text cut into several, or an error"""

    def __post_init__(self) -> None:
        if self.streams < 1:
            raise ValueError(f"streams {self.streams} must be at least 1")


@dataclass(frozen=True)
class Drawn:
    """One sample's place in the training order: its number, of all streams, source and position. Its document follows.

    `piece` numbers the documents that a text was cut into, None where it was not. `alone` documents found no others of
    their kind and fill their groups with further copies of their own.
    """

    number: int
    source: str
    position: Position
    piece: int | None = None
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
        readers: Mapping[str, SourceReader] | None = None,
    ) -> None:
        check_weights(config.sources)
        check_tasks(config.compose, modalities)
        self.config = config
        self.modalities = modalities
        self.seed = seed
        self.grouping = grouping
        self.stream = stream
        readers = readers or {name: SourceReader(source) for name, source in config.sources.items()}
        self.streams = {
            name: SampleStream(name, source, seed, stream, config.streams, readers[name])
            for name, source in config.sources.items()
        }
        weights = {name: source.weight for name, source in config.sources.items()}
        self.mix = Mix(weights, config.weights, seed)
        self.positions = dict.fromkeys(self.streams, Position())
        self.num_drawn = 0
        self.num_groups = 0
        self.waiting: list[Drawn] = []
        self._composed: dict[Drawn, Document] = {}  # of those that wait; made again after a resume
        self._num_useless = 0  # since one was placed
        self._num_alone = 0
        self._num_cut = self._num_pieces = 0

    def state(self) -> dict[str, Any]:
        """What `load_state` needs, as JSON."""
        return {
            "data": self._describe(),
            "positions": {name: dict(vars(position)) for name, position in self.positions.items()},
            "tokens": dict(self.mix.tokens),
            "num_drawn": self.num_drawn,
            "num_groups": self.num_groups,
            "waiting": [{**vars(drawn), "position": dict(vars(drawn.position))} for drawn in self.waiting],
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`. Raises ValueError where it was counted on other data, which it names."""
        if changed := _changes(state.get("data"), self._describe()):
            raise ValueError(f"the checkpoint cannot go on with this data: {changed}")
        self.positions = {name: Position(**position) for name, position in state["positions"].items()}
        self.mix.tokens = dict(state["tokens"])
        self.num_drawn = state["num_drawn"]
        self.num_groups = state["num_groups"]
        self.waiting = [
            Drawn(**{**item, "position": Position(**item["position"])}) for item in state["waiting"]
        ]
        self._composed.clear()

    def _describe(self) -> dict[str, Any]:
        sources = {name: stream.reader.describe() for name, stream in self.streams.items()}
        return {"streams": self.config.streams, "stream": self.stream, "sources": sources}

    def __iter__(self) -> Iterator[tuple[PackedBatch, dict[str, Any]]]:
        while True:
            yield self._next_batch(), self.state()

    def _next_batch(self) -> PackedBatch:
        packer = Packer(self.config.pack, self.modalities, self.grouping)
        units: Units[Drawn] = Units(self.grouping)
        # All that waited is offered anew, in its order: a resumed run, which knows no more, does the same.
        old, self.waiting = self.waiting, []
        for drawn in old:
            self._offer(packer, units, drawn, self._composed.pop(drawn, None) or self._compose_again(drawn))
        while (room := self.config.pack.lookahead - len(self.waiting)) > 0:
            for drawn, document in self._draw(packer, self._num_at_once(room)):
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
        filled = fill_groups(document, self.grouping)
        if not packer.fits_empty(filled):
            sample = self.streams[drawn.source].at(drawn.position)
            self._drop(drawn, sample, f"no room in a batch for a group of {self.grouping.particles}")
            return
        self._num_alone += 1
        self.mix.add(drawn.source, sum(filled.lengths) - sum(document.lengths))
        self._place(packer, [(replace(drawn, alone=True), filled)])

    def _place(self, packer: Packer, unit: Sequence[tuple[Drawn, Document]]) -> None:
        self._num_useless = 0
        if not packer.add(*(document for _, document in unit)):
            self._wait(unit)

    def _wait(self, entries: Sequence[tuple[Drawn, Document]]) -> None:
        for drawn, document in entries:
            self.waiting.append(drawn)
            self._composed[drawn] = document

    def _num_at_once(self, room: int) -> int:
        """How many samples may be drawn before the first of them is offered, where `room` documents more may wait."""
        if self.config.too_long == "split" or self.mix.follows_lengths:
            return 1  # a sample may give any number of documents, or decide which source the next one is of
        # each may complete a unit of as many documents as a group has particles, all of which may have to wait
        return min(max(room // self.grouping.particles, 1), AT_ONCE)

    def _draw(self, packer: Packer, num: int) -> Iterator[tuple[Drawn, Document]]:
        """The documents of the next `num` samples: of each one, those it is cut into, or none where it is of no use.

        All are read, then all are composed: code that runs again at once takes less time.
        """
        read = [self._read() for _ in range(num)]
        draws = [self._randomness(drawn) for drawn, _ in read]
        composed = [
            None if sample is None else self._compose(drawn, sample, draw)
            for (drawn, sample), draw in zip(read, draws, strict=True)
        ]
        for (drawn, sample), document in zip(read, composed, strict=True):
            if sample is None or document is None:
                self._count_useless()
            elif isinstance(document, MissingPart):
                self._drop(drawn, sample, document.reason)
            else:
                found = self._fit(packer, drawn, document, sample)
                self.mix.add(drawn.source, sum(sum(each.lengths) for _, each in found))
                yield from found

    def _read(self) -> tuple[Drawn, Sample | None]:
        """The next sample; None where it is broken, which was counted."""
        number = self._number(self.num_drawn)
        name = self.mix.next(number)
        position = self.streams[name].find(self.positions[name])
        self.positions[name] = self.streams[name].next(position)
        self.num_drawn += 1
        try:
            sample = self.streams[name].at(position)
        except BrokenSample:
            sample = None
        return Drawn(number, name, position), sample

    def _fit(
        self, packer: Packer, drawn: Drawn, document: Document, sample: Sample
    ) -> list[tuple[Drawn, Document]]:
        if packer.fits_empty(document):
            return [(drawn, document)]
        if self.config.too_long == "split" and (pieces := self._cut(document)):
            self._num_cut += 1
            self._num_pieces += len(pieces)
            return [(replace(drawn, piece=piece), each) for piece, each in enumerate(pieces)]
        if self.config.too_long == "stop":
            context, state = document.lengths
            pack = self.config.pack
            raise ValueError(
                f"source {drawn.source}: {sample.shard}: {sample.key} has {context} context and {state} state tokens, "
                f"longer than a row of the batch ({pack.context_length} and {pack.state_length}); data.too_long drop "
                "would leave it out, split would cut it if it is a text"
            )
        self._drop(drawn, sample, "longer than a row of the batch")
        return []

    def _randomness(self, drawn: Drawn) -> np.random.Generator:
        """What the sample's document is composed by."""
        return keyed_numpy(self.seed, "compose", drawn.number)

    def _compose(self, drawn: Drawn, sample: Sample, draw: np.random.Generator) -> Document | MissingPart:
        """The sample's document, or why there is none: returned, to be counted when it is the sample's turn."""
        try:
            return compose(sample, self.config.compose, self.modalities, draw, drawn.source)
        except MissingPart as missing:
            return missing

    def _cut(self, document: Document) -> list[Document]:
        return cut_text(document, self.config.pack.context_length, self.modalities)

    def _compose_again(self, drawn: Drawn) -> Document:
        """The document of one that waited, after a resume."""
        sample = self.streams[drawn.source].at(drawn.position)
        document = self._compose(drawn, sample, self._randomness(drawn))
        assert isinstance(document, Document), "it was a document before it waited"
        if drawn.piece is not None:
            document = self._cut(document)[drawn.piece]
        return fill_groups(document, self.grouping) if drawn.alone else document

    def _drop(self, drawn: Drawn, sample: Sample, reason: str) -> None:
        self.streams[drawn.source].reader.drop(sample, reason)
        self._count_useless()

    def _count_useless(self) -> None:
        self._num_useless += 1
        if self._num_useless >= USELESS:
            raise ValueError(f"of the last {USELESS} samples none can be used: {self.remarks()}")

    def remarks(self) -> str:
        """One line on what was of no use so far, and what filled a group by itself; empty where there is nothing."""
        return describe_counts(count_treated([self]))


Counts = Counter[tuple[str, str, str]]
"""(source, "samples" or "shards", reason) -> how many are broken for it, with the reason "" how many were seen; and
("", "documents", what became of them). Those of several processes add up."""


def count_treated(loaders: Sequence[Loader]) -> Counts:
    """What the loaders of a process met so far; they share their readers."""
    found: Counts = Counter()
    for name, stream in loaders[0].streams.items():
        rejects = stream.rejects
        for what, seen, broken in (
            ("samples", rejects.num_samples, rejects.samples),
            ("shards", rejects.num_shards, rejects.shards),
        ):
            found[name, what, ""] += seen
            for reason, number in broken.items():
                found[name, what, reason] += number
    for loader in loaders:
        found["", "documents", "alone"] += loader._num_alone
        found["", "documents", "cut"] += loader._num_cut
        found["", "documents", "pieces"] += loader._num_pieces
    return found


def describe_counts(counts: Counts) -> str:
    """One line on what is no plain good sample; empty where all are."""
    found = []
    for source in dict.fromkeys(name for name, _, _ in counts if name):
        own = {
            what: Counter({key[2]: n for key, n in counts.items() if key[:2] == (source, what) and key[2]})
            for what in ("samples", "shards")
        }
        if any(own.values()):
            seen = {what: counts[source, what, ""] for what in own}
            found.append(
                f"{source}: {summary(own['samples'], seen['samples'], own['shards'], seen['shards'])}"
            )
    if alone := counts["", "documents", "alone"]:
        found.append(f"{alone} documents filled groups by themselves, for want of others of their shape")
    if cut := counts["", "documents", "cut"]:
        pieces = counts["", "documents", "pieces"]
        found.append(f"{cut} texts longer than a row of the batch were cut into {pieces} documents")
    return "; ".join(found)


def row_of_counts(counts: Counts) -> dict[str, int]:
    """What a row of metrics says of them; nothing of what there is none of."""
    broken = Counter({f"broken_{what}": 0 for what in ("samples", "shards")})
    for (source, what, reason), number in counts.items():
        if source and reason:
            broken[f"broken_{what}"] += number
    broken["cut_texts"] = counts["", "documents", "cut"]
    return {name: number for name, number in broken.items() if number}


def _changes(old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> str:
    """What of the data is not what it was, in words; empty where all is."""
    if old is None:
        return "it does not say which data it was trained on"
    if sorted(old["sources"]) != sorted(new["sources"]):
        return f"it was trained on sources {sorted(old['sources'])}, this run has {sorted(new['sources'])}"
    for key in ("streams", "stream"):
        if old[key] != new[key]:
            return f"data.streams: its {key} was {old[key]}, is {new[key]}"
    for name, was in old["sources"].items():
        now = new["sources"][name]
        if was["window"] != now["window"]:
            return f"the window of source {name} was {was['window']}, is {now['window']}"
        if was["filters"] != now["filters"]:
            return f"source {name} takes other samples: its include lists or thin changed"
        if was["digest"] != now["digest"]:
            counts = [f"{each['shards']} shards of {each['bytes']} bytes" for each in (was, now)]
            what = (
                f"were {counts[0]}, are {counts[1]}"
                if counts[0] != counts[1]
                else "have other names or contents"
            )
            return f"the shards of source {name} {what}"
    return ""


def build_loaders(
    config: DataConfig, modalities: Mapping[str, Modality], seed: int, grouping: Grouping = UNGROUPED
) -> list[Loader]:
    """A loader for each stream of the data; what one of them decodes, the others of its process need not."""
    readers = {name: SourceReader(source) for name, source in config.sources.items()}
    return [Loader(config, modalities, seed, grouping, stream, readers) for stream in range(config.streams)]
