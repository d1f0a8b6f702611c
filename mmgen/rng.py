"""Random numbers keyed by counters, so that a draw is a pure function of what it is for.

Nothing here keeps state: resuming a run, moving a sample to another rank or batching a request with others
leaves every draw as it was.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch


def _seed(key: tuple[int | str, ...]) -> int:
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # torch takes seeds below 2**63 on every device


def keyed_numpy(*key: int | str) -> np.random.Generator:
    """A numpy generator for `key`; the same key gives the same stream on every machine."""
    return np.random.Generator(np.random.Philox(_seed(key)))


def draw_index(weights: Sequence[float], draw: np.random.Generator) -> int:
    """An index by weight: what `draw.choice` with these probabilities takes, with less work."""
    totals = list(accumulate(weights))
    return bisect_right([total / totals[-1] for total in totals], draw.random())


def keyed_torch(*key: int | str) -> torch.Generator:
    """A CPU torch generator for `key`."""
    return torch.Generator().manual_seed(_seed(key))
