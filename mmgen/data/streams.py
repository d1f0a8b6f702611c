"""A source of samples in an endless, keyed order: the sample at a position is a pure function of (seed, position).

Each epoch permutes the shards; `window` shards at a time are read and their samples permuted together. A position is
(epoch, window, index), so that resuming re-reads one window and nothing is skipped or repeated. Several streams share a
source: part i of n takes the samples i, i + n, ... of every window, so that together they hold each sample once.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mmgen.data.rejects import Rejects
from mmgen.data.shards import find_shards, read_shard
from mmgen.rng import keyed_numpy
from mmgen.sequence import Sample


@dataclass(frozen=True)
class SourceConfig:
    path: str
    """a data-set folder, a folder of tars, or a pattern of tars"""
    split: str = "train"
    weight: float = 1.0
    """how often a sample is drawn from this source, against the others"""
    include: dict[str, str] = field(default_factory=dict)
    """metadata field -> text file of the values that are taken, one a line"""
    thin: dict[str, float] = field(default_factory=dict)
    """metadata field -> share that each epoch takes of the samples where the field is set (not null, 0 or empty)"""
    window: int = 16
    """shards that are shuffled together"""
    cache_mb: int = 512
    """shards that are kept decoded, by their size on disk"""
    max_broken: float = 0.02
    """share of broken samples above which training stops"""

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise ValueError(f"weight {self.weight} must be above 0; leave the source out instead")
        if self.window < 1:
            raise ValueError(f"window {self.window} must be at least 1 shard")
        for name, share in self.thin.items():
            if not 0 < share <= 1:
                raise ValueError(f"thin.{name} {share} must be in (0, 1]")


@dataclass(frozen=True)
class Position:
    epoch: int = 0
    window: int = 0
    index: int = 0


class ShardReader:
    """The shards of one source, decoded and kept as far as the source's configuration allows."""

    def __init__(self, config: SourceConfig) -> None:
        self.config = config
        self.paths = find_shards(config.path, config.split)
        self.rejects = Rejects(max_rate=config.max_broken)
        self.include = {key: _read_list(path) for key, path in config.include.items()}
        self._kept: OrderedDict[Path, list[Sample]] = OrderedDict()

    def read(self, path: Path) -> list[Sample]:
        """The samples of a shard that the source takes."""
        if path not in self._kept:
            self._kept[path] = [s for s in read_shard(path, self.rejects) if self._is_included(s)]
            self._trim()
        self._kept.move_to_end(path)
        return self._kept[path]

    def _trim(self) -> None:
        limit = self.config.cache_mb * 2**20
        while sum(path.stat().st_size for path in self._kept) > limit and len(self._kept) > 1:
            self._kept.popitem(last=False)

    def _is_included(self, sample: Sample) -> bool:
        return all(str(sample.metadata.get(key)) in values for key, values in self.include.items())


class SampleStream:
    """Samples of one source, or one of several `parts` of them. `at` reads a position, `next` says what follows it.

    Streams of one source may share its `reader`.
    """

    def __init__(
        self,
        name: str,
        config: SourceConfig,
        seed: int,
        part: int = 0,
        parts: int = 1,
        reader: ShardReader | None = None,
    ) -> None:
        assert 0 <= part < parts, f"part {part} of {parts}"
        self.name = name
        self.config = config
        self.seed = seed
        self.part = part
        self.parts = parts
        self.reader = reader or ShardReader(config)
        self._window: tuple[tuple[int, int], list[Sample]] | None = None

    @property
    def rejects(self) -> Rejects:
        return self.reader.rejects

    @property
    def num_windows(self) -> int:
        return -(-len(self.reader.paths) // self.config.window)

    def begin(self) -> Position:
        """Before the stream's first sample (see `find`)."""
        return Position(index=self.part)

    def next(self, position: Position) -> Position:
        """What follows a position that `find` returned (see `find`)."""
        return Position(position.epoch, position.window, position.index + self.parts)

    def find(self, position: Position) -> Position:
        """`position`, or the first one after it that holds a sample of this stream.

        Raises ValueError where a whole epoch has none.
        """
        for _ in range(2 * self.num_windows + 1):
            if position.index < len(self._samples(position.epoch, position.window)):
                return position
            last = position.window + 1 == self.num_windows
            position = Position(position.epoch + last, 0 if last else position.window + 1, self.part)
        wanted = f" with {self.config.include}" if self.config.include else ""
        share = f" for each of {self.parts} streams" if self.parts > 1 else ""
        raise ValueError(
            f"source {self.name}: {self.config.path} has no usable sample{wanted}{share}; {self.rejects.summary()}"
        )

    def at(self, position: Position) -> Sample:
        """The sample at a position that `find` returned."""
        return self._samples(position.epoch, position.window)[position.index]

    def _samples(self, epoch: int, window: int) -> list[Sample]:
        if self._window is None or self._window[0] != (epoch, window):
            order = keyed_numpy(self.seed, self.name, "shards", epoch).permutation(len(self.reader.paths))
            chosen = order[window * self.config.window : (window + 1) * self.config.window]
            # in order of name: the window's samples do not depend on which shard was drawn first
            samples = [
                sample for index in sorted(chosen) for sample in self.reader.read(self.reader.paths[index])
            ]
            samples = [sample for sample in samples if self._is_drawn(sample, epoch)]
            shuffled = keyed_numpy(self.seed, self.name, "samples", epoch, window).permutation(len(samples))
            self._window = ((epoch, window), [samples[index] for index in shuffled])
        return self._window[1]

    def _is_drawn(self, sample: Sample, epoch: int) -> bool:
        for key, share in self.config.thin.items():
            if sample.metadata.get(key):
                if keyed_numpy(self.seed, self.name, "thin", epoch, sample.key).random() >= share:
                    return False
        return True


def _read_list(path: str) -> frozenset[str]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"include file {path} cannot be read: {error.strerror}") from None
    return frozenset(line.strip() for line in lines if line.strip() and not line.startswith("#"))


def check_weights(sources: Mapping[str, SourceConfig]) -> None:
    """Raises ValueError where there is no source to draw from."""
    if not sources:
        raise ValueError("data.sources is empty: name at least one, for example {emoji: {path: FOLDER}}")
