"""Samples -> batches, with a state after each batch from which the next one follows bit for bit.

Every draw is keyed by the number of the sample, so the state is a few counters: where each source stands, how many
samples and groups were drawn, and which documents wait for a row with room.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from mmgen.data.compose import ComposeConfig, check_tasks, compose
from mmgen.data.pack import PackConfig, Packer
from mmgen.data.streams import Position, SampleStream, SourceConfig, check_weights
from mmgen.modalities import MissingPart, Modality
from mmgen.rng import keyed_numpy
from mmgen.sequence import Document, PackedBatch

LOOKAHEAD = 16  # documents that may wait before a batch is closed


@dataclass(frozen=True)
class DataConfig:
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    compose: ComposeConfig = field(default_factory=ComposeConfig)
    pack: PackConfig = field(default_factory=PackConfig)


@dataclass(frozen=True)
class Drawn:
    """One sample's place in the training order: its global number, source and position. Its document follows."""

    number: int
    source: str
    position: Position


class Loader:
    """Iterates over (batch, state); `load_state` continues after the batch that a state came with."""

    def __init__(self, config: DataConfig, modalities: Mapping[str, Modality], seed: int) -> None:
        check_weights(config.sources)
        check_tasks(config.compose, modalities)
        self.config = config
        self.modalities = modalities
        self.seed = seed
        self.streams = {name: SampleStream(name, source, seed) for name, source in config.sources.items()}
        weights = np.array([source.weight for source in config.sources.values()])
        self._shares = weights / weights.sum()
        self._names = list(config.sources)
        self.positions = {name: Position() for name in config.sources}
        self.num_drawn = 0
        self.num_groups = 0
        self.waiting: list[Drawn] = []
        self._composed: dict[int, Document] = {}  # of those that wait; made again after a resume
        # samples of no use, counted once however often they are drawn
        self._dropped: set[tuple[str, str]] = set()

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
            Drawn(item["number"], item["source"], Position(**item["position"])) for item in state["waiting"]
        ]

    def __iter__(self) -> Iterator[tuple[PackedBatch, dict[str, Any]]]:
        while True:
            yield self._next_batch(), self.state()

    def _next_batch(self) -> PackedBatch:
        packer = Packer(self.config.pack, self.modalities)
        old, self.waiting = self.waiting, []
        for drawn in old:
            document = self._composed.pop(drawn.number, None) or self._document(drawn)
            assert document is not None, "a document that waits was composed before"
            self._place(packer, drawn, document)
        while len(self.waiting) < LOOKAHEAD:
            drawn = self._draw()
            document = self._document(drawn)
            if document is None:
                continue
            if not packer.fits_empty(document):
                self._drop(drawn, "longer than a row of the batch")
            else:
                self._place(packer, drawn, document)
        batch = packer.finish(self.num_groups)
        self.num_groups += len(batch.instances.group)
        return batch

    def _place(self, packer: Packer, drawn: Drawn, document: Document) -> None:
        if not packer.add(document):
            self.waiting.append(drawn)
            self._composed[drawn.number] = document

    def _draw(self) -> Drawn:
        number = self.num_drawn
        name = self._names[0]
        if len(self._names) > 1:
            name = self._names[
                keyed_numpy(self.seed, "source", number).choice(len(self._names), p=self._shares)
            ]
        position = self.streams[name].find(self.positions[name])
        self.positions[name] = Position(position.epoch, position.window, position.index + 1)
        self.num_drawn += 1
        return Drawn(number, name, position)

    def _document(self, drawn: Drawn) -> Document | None:
        sample = self.streams[drawn.source].at(drawn.position)
        try:
            return compose(
                sample, self.config.compose, self.modalities, keyed_numpy(self.seed, "compose", drawn.number)
            )
        except MissingPart as missing:
            self._drop(drawn, missing.reason)
            return None

    def _drop(self, drawn: Drawn, reason: str) -> None:
        stream = self.streams[drawn.source]
        sample = stream.at(drawn.position)
        if (sample.shard, sample.key) not in self._dropped:
            self._dropped.add((sample.shard, sample.key))
            stream.rejects.drop(reason, f"{sample.shard}: {sample.key}")

    def broken(self) -> str:
        """One line on the samples and shards that were of no use so far; empty where there are none."""
        rejects = {name: stream.rejects for name, stream in self.streams.items()}
        return "; ".join(f"{name}: {r.summary()}" for name, r in rejects.items() if r.samples or r.shards)
