"""Which samples of which shards a stream reads in an epoch: every sample of the epoch is in exactly one stream.

The shards of an epoch stand in an order of their own, which (seed, source, epoch) decides.

* Where there are at least WHOLE shards for each stream, shard j goes whole to stream j mod n. Streams then differ by
  one shard at most, an eighth of what they read.
* Else the order is cut into n runs that follow each other, so a stream begins and ends within a shard and takes whole
  ones between; at most n - 1 shards more are opened than there are. Where the manifest says how many samples a shard
  has, the runs are equal to a sample. Where it is not known, each shard counts as P parts (part p has its samples p,
  p + P, ...), with the least P for which n divides N * P: n / gcd(N, n).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import gcd

from mmgen.rng import keyed_numpy

WHOLE = 8


@dataclass(frozen=True)
class Part:
    """The samples of a shard whose number modulo `of` is in [first, last)."""

    shard: int
    first: int = 0
    last: int = 1
    of: int = 1

    def takes(self, number: int) -> bool:
        return self.first <= number % self.of < self.last


def deal(
    counts: Sequence[int | None], name: str, seed: int, epoch: int, stream: int, streams: int
) -> list[Part]:
    """The parts that a stream reads in an epoch, in order; `counts` are the samples of each shard, where known."""
    order = keyed_numpy(seed, name, "shards", epoch).permutation(len(counts)).tolist()
    if streams == 1 or len(order) >= WHOLE * streams:
        return [Part(shard) for shard in order[stream::streams]]
    parts = [count for count in counts if count is not None]
    if len(parts) < len(counts):
        parts = [streams // gcd(len(counts), streams)] * len(counts)
    total = sum(parts)
    begin, end = total * stream // streams, total * (stream + 1) // streams
    starts = accumulate((parts[shard] for shard in order), initial=0)
    runs = [
        Part(shard, max(begin - start, 0), min(end - start, parts[shard]), parts[shard])
        for shard, start in zip(order, starts, strict=False)
    ]
    return [part for part in runs if part.first < part.last]


def check_deal(counts: Sequence[int | None], name: str, streams: int) -> None:
    """Raises ValueError where some stream could never have a sample."""
    total = sum(count for count in counts if count is not None)
    if None not in counts and total < streams:
        raise ValueError(
            f"source {name} has {total} samples, too few for data.streams {streams}: each stream needs one at least"
        )
