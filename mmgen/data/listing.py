"""Where in a tar its samples lie, so that one is read without reading those before it.

For a plain local tar this is found by reading the headers alone, and kept beside a large one as `NAME.tar.idx.json`
where that folder can be written. It holds while the tar has the size that it names and is not newer.
"""

import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from webdataset.tariterators import group_by_keys, meta_prefix, meta_suffix

from mmgen.files import write_text

INDEX_SUFFIX = ".idx.json"
INDEX_FROM = 4096  # samples from which a run keeps the index beside a tar that has none
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"(\xb5/\xfd")  # gzip, bzip2, xz, zstd


@dataclass(frozen=True)
class Listing:
    """The samples of one plain tar, in order.

    Sample i has the members `kinds[kind[i]]` (their suffixes), which lie at `offsets` and have `sizes` from `first[i]`
    on, in bytes. `broken` is why a tar ends too early; None for a whole one.
    """

    keys: tuple[str, ...]
    kinds: tuple[tuple[str, ...], ...]
    kind: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    first: np.ndarray
    broken: str | None = None

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def num_bytes(self) -> int:
        """Bytes of memory that it takes, about."""
        return sum(map(len, self.keys)) + 60 * len(self.keys) + 16 * len(self.offsets)

    def members(self, number: int) -> dict[str, tuple[int, int]]:
        """suffix -> (offset, size) of the members of a sample."""
        suffixes = self.kinds[self.kind[number]]
        here = slice(self.first[number], self.first[number] + len(suffixes))
        places = zip(self.offsets[here].tolist(), self.sizes[here].tolist(), strict=True)
        return dict(zip(suffixes, places, strict=True))


def is_plain_tar(path: Path) -> bool:
    """Whether the file is a tar that is not compressed, as far as its name and first bytes say."""
    if path.suffix != ".tar" or not path.is_file():
        return False
    with open(path, "rb") as stream:
        return not stream.read(8).startswith(COMPRESSED)


def list_tar(path: Path) -> Listing:
    """The listing of a plain tar: from the file beside it, or from its headers. Raises OSError."""
    found = _read_index(path)
    if found is None:
        found = scan_tar(path)
        if found.broken is None and len(found) >= INDEX_FROM:
            write_index(path, found)
    return found


def scan_tar(path: Path) -> Listing:
    """The listing of a plain tar, from its headers. Raises OSError."""
    broken = None
    keys, kinds, kind, offsets, sizes, first = [], {}, [], [], [], []
    groups = group_by_keys(_members(path))
    while True:
        try:
            group = next(groups, None)
        except (tarfile.ReadError, ValueError) as error:  # the sample that it cuts is left out
            broken = shard_reason(error, len(keys))
            break
        if group is None:
            break
        keys.append(group.pop("__key__"))
        del group["__url__"]
        kind.append(kinds.setdefault(tuple(group), len(kinds)))
        first.append(len(offsets))
        offsets += [offset for offset, _ in group.values()]
        sizes += [size for _, size in group.values()]
    if broken is None:
        broken = "empty shard" if not keys else "truncated shard" if _cut_short(path) else None
    columns = (np.array(column, dtype=np.int64) for column in (kind, offsets, sizes, first))
    return Listing(tuple(keys), tuple(kinds), *columns, broken=broken)


def shard_reason(error: Exception, num_groups: int) -> str:
    """What a shard that cannot be read (on) is counted under, given the samples that were read of it."""
    if isinstance(error, FileNotFoundError):
        return "missing shard"
    if isinstance(error, ValueError):
        return "two members of one name"  # group_by_keys refuses them
    if "empty file" in str(error):
        return "empty shard"
    return "truncated shard" if num_groups else "not a tar"


def _members(path: Path) -> Iterator[dict[str, Any]]:
    """What webdataset groups, with (offset, size) for the bytes."""
    with tarfile.open(path, "r:") as tar:
        for info in tar_members(tar):
            yield {"fname": info.name, "data": (info.offset_data, info.size), "__url__": str(path)}
    yield {}  # what group_by_keys takes for the end of a shard


def tar_members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The files of a tar that webdataset would read, in order, without keeping them."""
    while (info := tar.next()) is not None:
        tar.members = []  # pyright: ignore[reportAttributeAccessIssue]  # else it remembers every one
        top = info.name.split("/", 1)[0]
        if (
            info.isreg()
            and not info.issparse()
            and not (top.startswith(meta_prefix) and top.endswith(meta_suffix))
        ):
            yield info


def write_index(path: Path, listing: Listing) -> None:
    """Keeps a listing beside its tar, where its folder can be written."""
    record = {
        "num_bytes": path.stat().st_size,
        "keys": listing.keys,
        "kinds": listing.kinds,
        **{name: getattr(listing, name).tolist() for name in ("kind", "offsets", "sizes")},
    }
    with suppress(OSError):  # a folder that may only be read: the headers are read again next time
        write_text(index_path(path), json.dumps(record, separators=(",", ":"), ensure_ascii=False))


def index_path(path: Path) -> Path:
    return path.with_name(path.name + INDEX_SUFFIX)


def _read_index(path: Path) -> Listing | None:
    beside = index_path(path)
    try:
        tar, index = path.stat(), beside.stat()
        if index.st_mtime_ns < tar.st_mtime_ns:
            return None
        record = json.loads(beside.read_text(encoding="utf-8"))
        return _parse(record) if record["num_bytes"] == tar.st_size else None
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None  # none, or one that is not ours: the headers say it as well


def _parse(record: Mapping[str, Any]) -> Listing:
    kinds = tuple(map(tuple, record["kinds"]))
    kind, offsets, sizes = (np.array(record[name], dtype=np.int64) for name in ("kind", "offsets", "sizes"))
    counts = np.array([len(suffixes) for suffixes in kinds], dtype=np.int64)[kind]
    if not len(kind) == len(record["keys"]) or not counts.sum() == len(offsets) == len(sizes):
        raise ValueError("columns of different lengths")
    return Listing(tuple(record["keys"]), kinds, kind, offsets, sizes, np.cumsum(counts) - counts)


def _cut_short(path: Path) -> bool:
    """Whether a plain tar lacks its closing zeros: tarfile takes one that was cut between members for whole."""
    with open(path, "rb") as stream:
        stream.seek(-min(1024, os.fstat(stream.fileno()).st_size), os.SEEK_END)
        return any(stream.read())
