"""One source of samples: its configuration, which of its samples are taken, and what of them stays in memory."""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from mmgen.data.codec import BrokenSample, decode_sample
from mmgen.data.deal import Part
from mmgen.data.find import describe, find_shards
from mmgen.data.listing import Listing
from mmgen.data.read import BrokenShard, Entry, find_listing, read_entries
from mmgen.data.rejects import Rejects
from mmgen.data.remote import RemoteConfig
from mmgen.sequence import Sample


@dataclass(frozen=True)
class SourceConfig:
    path: str | tuple[str, ...]
    """a data-set folder, a folder of tars, a pattern of tars, a web address, pipe:COMMAND; or a list of these"""
    split: str = "train"
    weight: float = 1.0
    """how much comes from this source, against the others; see data.weights"""
    include: dict[str, str] = field(default_factory=dict)
    """metadata field -> text file of the values that are taken, one a line"""
    thin: dict[str, float] = field(default_factory=dict)
    """metadata field -> share that each epoch takes of the samples where the field is set (not null, 0 or empty)"""
    window: int = 1000
    """samples that are shuffled together; so many of each stream are in memory, undecoded"""
    cache_mb: int = 512
    """decoded samples that are kept, those used last; of each process that makes batches"""
    max_broken: float = 0.02
    """share of broken samples above which training stops"""
    remote: RemoteConfig = field(default_factory=RemoteConfig)

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise ValueError(f"weight {self.weight} must be above 0; leave the source out instead")
        if self.window < 1:
            raise ValueError(f"window {self.window} must be at least 1 sample")
        for name, share in self.thin.items():
            if not 0 < share <= 1:
                raise ValueError(f"thin.{name} {share} must be in (0, 1]")


LEFT_OUT = object()  # stands in memory for a sample that `include` does not take
Place = tuple[int, int]
"""a shard of the source, and the number of a sample in it"""


@dataclass(frozen=True)
class Item:
    """A sample that the source takes: decoded where that is in memory, else its members."""

    place: Place
    held: Sample | Mapping[str, Any]


class SourceReader:
    """Reads the samples of one source for all its streams in this process. Raises ValueError where it has no shards."""

    def __init__(self, config: SourceConfig) -> None:
        self.config = config
        self.shards = find_shards(config.path, config.split, config.remote)
        self.counts = [None if shard.known is None else shard.known.num_samples for shard in self.shards]
        self.rejects = Rejects(max_rate=config.max_broken)
        self.include = {key: _read_list(path) for key, path in config.include.items()}
        self._kept = _Cache(config.cache_mb * 2**20)
        self._lengths: dict[int, int] = {}  # of the shards that were read in order, to their end
        self._counted: dict[int, bytearray] = {}  # a bit for each sample that was decoded, by shard
        self._counted_shards: set[int] = set()
        self._dropped: set[tuple[str, str]] = set()

    def describe(self) -> dict[str, Any]:
        """What a resumed run must find unchanged, as JSON."""
        include = {name: sorted(values) for name, values in self.include.items()}
        filters = hashlib.sha256(json.dumps([include, dict(self.config.thin)]).encode()).hexdigest()[:16]
        return {**describe(self.shards), "window": self.config.window, "filters": filters}

    def read(
        self, part: Part, first: int, is_drawn: Callable[[str, Mapping[str, Any]], bool]
    ) -> Iterator[Item]:
        """The part's samples from number `first` of its shard on, undecoded.

        Without those that `include` leaves out, and those for which `is_drawn(key, metadata)` is false. What is wrong
        with the shard is counted in `rejects`.
        """
        whole = self._all_kept(part, first)
        if whole is not None:
            for number, held in whole:
                if isinstance(held, Sample) and is_drawn(held.key, held.metadata):
                    yield Item((part.shard, number), held)
            return
        for entry in self._entries(part, first):
            place = part.shard, entry.number
            held = self._kept.get(place) or self._choose(place, entry, is_drawn)
            if isinstance(held, Sample):
                if is_drawn(held.key, held.metadata):
                    yield Item(place, held)
            elif isinstance(held, Mapping):
                yield Item(place, held)

    def decode(self, item: Item) -> Sample:
        """The sample of an item. Raises BrokenSample, counted once."""
        kept = self._kept.get(item.place)
        held = kept if isinstance(kept, Sample) else item.held
        if isinstance(held, Sample):
            return held
        new = self._count(item.place)
        try:
            sample = decode_sample(held)
        except BrokenSample as broken:
            if new:
                self.rejects.reject(str(broken), f"{held['__url__']}: {held['__key__']}")
            raise
        if new:
            self.rejects.keep()
        self._kept.put(item.place, sample, _size(sample))
        return sample

    def drop(self, sample: Sample, reason: str) -> None:
        """Counts a decoded sample as broken that proved of no use: once, however often and for whom it is drawn."""
        if (sample.shard, sample.key) not in self._dropped:
            self._dropped.add((sample.shard, sample.key))
            self.rejects.drop(reason, f"{sample.shard}: {sample.key}")

    def _choose(
        self, place: Place, entry: Entry, is_drawn: Callable[[str, Mapping[str, Any]], bool]
    ) -> Mapping[str, Any] | None:
        """The members of an entry that is taken, None where it is not, or not in this epoch."""
        if self.include or self.config.thin:
            metadata = _metadata(entry.member("json"))
            if metadata is not None and not self._is_included(metadata):
                self._kept.put(place, LEFT_OUT, 100)
                return None
            if not is_drawn(entry.key, metadata or {}):
                return None
        return entry.read()

    def _entries(self, part: Part, first: int) -> Iterator[Entry]:
        """The part's entries from `first` on; counts the shard where its end is reached."""
        shard = self.shards[part.shard]
        try:
            listing = self._listing(part.shard)
            number = first - 1
            run = part.of == self.counts[part.shard]  # a run of samples, not every so many
            for entry in read_entries(shard, self.config.remote, listing, max(first, part.first * run)):
                number = entry.number
                if run and number >= part.last:
                    return  # the rest is another stream's
                if part.takes(number):
                    yield entry
            if listing is None:
                self._lengths[part.shard] = number + 1
        except BrokenShard as broken:
            if part.shard not in self._counted_shards:
                self._counted_shards.add(part.shard)
                self.rejects.reject_shard(str(broken), shard.url)
            return
        if part.shard not in self._counted_shards:
            self._counted_shards.add(part.shard)
            self.rejects.keep_shard()

    def _listing(self, shard: int) -> Listing | None:
        listing = self._kept.get(("listing", shard))
        if listing is None:
            listing = find_listing(self.shards[shard], self.config.remote)
            if listing is not None:
                self._kept.put(("listing", shard), listing, listing.num_bytes)
        return listing

    def _all_kept(self, part: Part, first: int) -> list[tuple[int, Any]] | None:
        """All that is left of the part, where it need not be read for it."""
        length = self._lengths.get(part.shard, self.counts[part.shard])
        if length is None:
            return None
        numbers = [number for number in range(first, length) if part.takes(number)]
        held = [(number, self._kept.get((part.shard, number))) for number in numbers]
        return held if all(each is not None for _, each in held) else None

    def _count(self, place: Place) -> bool:
        """Whether a sample is seen for the first time."""
        shard, number = place
        bits = self._counted.setdefault(shard, bytearray())
        byte, bit = number // 8, 1 << number % 8
        bits.extend(bytes(max(byte + 1 - len(bits), 0)))
        new = not bits[byte] & bit
        bits[byte] |= bit
        return new

    def _is_included(self, metadata: Mapping[str, Any]) -> bool:
        return all(str(metadata.get(key)) in values for key, values in self.include.items())


class _Cache:
    """What was used last, up to so many bytes of memory."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._values: OrderedDict[Any, tuple[Any, int]] = OrderedDict()
        self._num_bytes = 0

    def get(self, key: Any) -> Any:
        if key not in self._values:
            return None
        self._values.move_to_end(key)
        return self._values[key][0]

    def put(self, key: Any, value: Any, num_bytes: int) -> None:
        if key in self._values:
            self._num_bytes -= self._values.pop(key)[1]
        self._values[key] = value, num_bytes
        self._num_bytes += num_bytes
        while self._num_bytes > self.limit:
            self._num_bytes -= self._values.popitem(last=False)[1][1]


def _metadata(data: bytes | None) -> dict[str, Any] | None:
    """The metadata of a sample; None where they are broken, which decoding it will say."""
    try:
        found = {} if data is None else json.loads(data)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _size(sample: Sample) -> int:
    """Bytes of memory, about."""
    pictures = [sample.picture, *(part for part in sample.parts if isinstance(part, Image.Image))]
    pixels = sum(3 * picture.width * picture.height for picture in pictures if picture is not None)
    texts = [*sample.captions.values(), *(part for part in sample.parts if isinstance(part, str))]
    latents = 0 if sample.latents is None else sample.latents.nbytes
    return pixels + latents + sum(map(len, texts)) + 2000  # the rest: objects, and metadata of the usual size


def _read_list(path: str) -> frozenset[str]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"include file {path} cannot be read: {error.strerror}") from None
    return frozenset(line.strip() for line in lines if line.strip() and not line.startswith("#"))
