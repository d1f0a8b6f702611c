"""The samples of a shard, in order, wherever it lies. Nothing here shuffles, filters or keeps.

An `Entry` is a sample of which nothing has been decoded and, in a plain local tar, nothing has been read: that is left
to whoever wants it.
"""

import errno
import os
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from webdataset.tariterators import group_by_keys

from mmgen.data.codec import MAX_PIXELS, BrokenSample, decode_sample
from mmgen.data.find import ShardFile
from mmgen.data.listing import COMPRESSED, Listing, is_plain_tar, list_tar, shard_reason, tar_members
from mmgen.data.rejects import Rejects
from mmgen.data.remote import RemoteConfig, RemoteStream, Unreachable, retried
from mmgen.sequence import Sample

T = TypeVar("T")


class BrokenShard(Exception):
    """A shard that cannot be read (on); the message is the reason it is counted under."""


class Entry(Protocol):
    """A sample of a shard: its number there, and its members when they are asked for."""

    @property
    def number(self) -> int: ...

    @property
    def key(self) -> str: ...

    def member(self, suffix: str) -> bytes | None:
        """One member. Raises BrokenShard."""
        ...

    def read(self) -> dict[str, Any]:
        """All members as webdataset groups them. Raises BrokenShard."""
        ...


@dataclass(frozen=True)
class _Placed:
    """In a plain local tar, open as `file`."""

    number: int
    url: str
    file: int
    listing: Listing
    remote: RemoteConfig

    @property
    def key(self) -> str:
        return self.listing.keys[self.number]

    def member(self, suffix: str) -> bytes | None:
        place = self.listing.members(self.number).get(suffix)
        return None if place is None else self._read(*place)

    def read(self) -> dict[str, Any]:
        members = self.listing.members(self.number)
        start = min(offset for offset, _ in members.values())
        data = self._read(start, max(offset + size for offset, size in members.values()) - start)
        group: dict[str, Any] = {"__key__": self.key, "__url__": self.url}
        for suffix, (offset, size) in members.items():
            group[suffix] = data[offset - start : offset - start + size]
        return group

    def _read(self, offset: int, size: int) -> bytes:
        data = retried(lambda: os.pread(self.file, size, offset), self.url, self.remote)
        if len(data) < size:
            raise BrokenShard("truncated shard")
        return data


@dataclass(frozen=True)
class _Held:
    """Of a stream that has passed by."""

    number: int
    group: dict[str, Any]

    @property
    def key(self) -> str:
        return self.group["__key__"]

    def member(self, suffix: str) -> bytes | None:
        return self.group.get(suffix)

    def read(self) -> dict[str, Any]:
        return self.group


def find_listing(shard: ShardFile, remote: RemoteConfig) -> Listing | None:
    """Where the samples of a shard lie, None where it has to be read in order.

    Raises BrokenShard where it is missing, Unreachable where the disk fails.
    """
    path = shard.path
    if path is None:
        return None
    return _retried(lambda: list_tar(path) if is_plain_tar(path) else None, shard, remote)


def _retried(read: Callable[[], T], shard: ShardFile, remote: RemoteConfig) -> T:
    """What `read` gives of a local shard, tried again where the disk fails: that does not make a shard a broken one."""

    def unless_missing() -> T:
        try:
            return read()
        except FileNotFoundError as error:
            raise BrokenShard(shard_reason(error, 0)) from None

    return retried(unless_missing, shard.url, remote)


def read_entries(
    shard: ShardFile, remote: RemoteConfig, listing: Listing | None = None, first: int = 0
) -> Iterator[Entry]:
    """The samples of a shard from number `first` on; by `listing` where it has one, else all before are read too.

    Raises BrokenShard where the shard ends before its end, Unreachable where its connection or disk fails.
    """
    if listing is not None:
        yield from _placed_entries(shard, remote, listing, first)
        return
    number = 0
    groups = group_by_keys(_members(shard, remote))
    while True:
        try:
            group = next(groups, None)
        except Unreachable:
            raise
        except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError) as error:
            # a decompressor's own OSError has no number; what the system says of a disk has one
            if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
                raise Unreachable(f"{shard.url} cannot be read: {error.strerror}") from None
            raise BrokenShard(shard_reason(error, number)) from None
        if group is None:
            break
        if number >= first:
            yield _Held(number, group)
        number += 1
    if number == 0:
        raise BrokenShard("empty shard")


def _placed_entries(shard: ShardFile, remote: RemoteConfig, listing: Listing, first: int) -> Iterator[Entry]:
    file = _retried(lambda: os.open(shard.url, os.O_RDONLY), shard, remote)
    try:
        for number in range(first, len(listing)):
            yield _Placed(number, shard.url, file, listing, remote)
    finally:
        os.close(file)
    if listing.broken is not None:
        raise BrokenShard(listing.broken)


def _members(shard: ShardFile, remote: RemoteConfig) -> Iterator[dict[str, Any]]:
    """What webdataset groups: name and bytes of every file of the tar."""
    path = shard.path
    source: Any = open(path, "rb") if path is not None else RemoteStream(shard.url, remote, shard.num_bytes)  # noqa: SIM115
    with source as stream, tarfile.open(fileobj=stream, mode="r|*") as tar:
        for info in tar_members(tar):
            file = tar.extractfile(info)
            assert file is not None, "a regular file"
            yield {"fname": info.name, "data": file.read(), "__url__": shard.url}
        if isinstance(stream, RemoteStream):
            _read_rest(stream)
    yield {}  # what group_by_keys takes for the end of a shard


def _read_rest(stream: RemoteStream) -> None:
    """Reads to the end: only there does a command say that it failed, and a plain tar have its closing zeros."""
    while stream.read(1 << 16):
        pass
    if not stream.head.startswith(COMPRESSED) and any(stream.tail):
        raise tarfile.ReadError("it lacks its closing zeros")


def read_shards(
    shards: Iterable[ShardFile | str | Path], rejects: Rejects, max_pixels: int = MAX_PIXELS
) -> Iterator[Sample]:
    """One pass over several shards. Raises ValueError where not one sample is usable or too much is broken."""
    files = [_as_file(shard) for shard in shards]
    for shard in files:
        yield from read_shard(shard, rejects, max_pixels)
    names = [shard.url for shard in files]
    rejects.finish(f"{names[0]} ... {names[-1]}" if len(names) > 1 else ", ".join(names))


def read_shard(
    shard: ShardFile | str | Path, rejects: Rejects, max_pixels: int = MAX_PIXELS
) -> Iterator[Sample]:
    """The samples of one shard, in order.

    Broken samples, and a shard that is missing, empty, truncated or no tar, are counted in `rejects` by reason and
    left out; ValueError when that is too much, or where a connection or a disk fails. A picture above `max_pixels` is
    refused from its header, undecoded.
    """
    file, remote = _as_file(shard), RemoteConfig()
    try:
        for entry in read_entries(file, remote, find_listing(file, remote)):
            group = entry.read()
            try:
                sample = decode_sample(group, max_pixels)
            except BrokenSample as broken:
                rejects.reject(str(broken), f"{file.url}: {group['__key__']}")
                continue
            rejects.keep()
            yield sample
    except BrokenShard as broken:
        return rejects.reject_shard(str(broken), file.url)
    rejects.keep_shard()


def _as_file(shard: ShardFile | str | Path) -> ShardFile:
    return shard if isinstance(shard, ShardFile) else ShardFile(str(shard))
