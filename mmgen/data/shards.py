"""WebDataset shards on disk, written with a manifest.

A data set is a folder: `manifest.json` and `<split>-000000.tar`, ..., those that are not compressed with an index (see
`mmgen/data/listing.py`). A sample with key K (no dots) has the members K.webp|png|jpg (picture), K.txt (the plain
caption), K.json (metadata; "captions" maps a level of detail to a caption), K.latents.npy (float16 or float32
[channels, height, width]) and, for an interleaved document, K.json's "parts" with the pictures in K.0.webp, K.1.webp,
... Nothing here reads samples.
"""

import gzip
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from webdataset.writer import TarWriter

from mmgen.data.codec import PictureFormat, encode_sample
from mmgen.data.listing import scan_tar, write_index
from mmgen.sequence import Sample

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Shard:
    """One tar of a data set: its name in the folder, and what `verify` compares it with."""

    path: str
    num_samples: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a data set holds: shards by split, member suffixes, licences, and the packages it was made from."""

    name: str
    splits: Mapping[str, Sequence[Shard]]
    columns: Sequence[str]
    description: str = ""
    licences: Sequence[str] = ()
    sources: Mapping[str, str] = field(default_factory=dict)

    def num_samples(self, split: str | None = None) -> int:
        """Samples of a split, or of all."""
        chosen = self.splits.values() if split is None else [self.splits[split]]
        return sum(shard.num_samples for shards in chosen for shard in shards)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tars together."""
        return sum(shard.num_bytes for shards in self.splits.values() for shard in shards)


# -- writing ---------------------------------------------------------------------------------------------------------


def write_shards(
    folder: Path,
    samples: Iterable[Sample],
    split_of: Callable[[Sample], str],
    name: str,
    description: str = "",
    licences: Sequence[str] = (),
    sources: Mapping[str, str] | None = None,
    attribution: str | None = None,
    picture_format: PictureFormat = "webp",
    max_samples_per_shard: int = 1000,
    compress: bool = False,
    overwrite: bool = False,
) -> Manifest:
    """Writes `samples` into shards of `folder`, one series of tars per split, and returns the manifest.

    The tars carry no time and no user, so the same samples give the same bytes. `webp` and `png` are lossless, `jpg`
    has quality 95. `compress` gives .tar.gz: worth it where pictures are small and padding is most of a tar. The
    folder appears whole or not at all. Raises ValueError for a folder that exists (with `overwrite`: that exists and
    is no data set), for a key with a dot or seen twice, and for no samples at all.
    """
    folder = Path(folder).absolute()
    check_target(folder, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        splits, columns = _write_tars(
            samples,
            split_of,
            picture_format,
            lambda split: _SplitWriter(temporary, split, max_samples_per_shard, compress),
        )
        manifest = Manifest(name, splits, columns, description, tuple(licences), dict(sources or {}))
        if attribution is not None:
            (temporary / "ATTRIBUTION.md").write_text(attribution, encoding="utf-8")
        (temporary / MANIFEST).write_text(json.dumps(asdict(manifest), indent=1) + "\n", encoding="utf-8")
        if folder.exists():
            old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
            folder.rename(old)
            temporary.rename(folder)
            shutil.rmtree(old)
        else:
            temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return manifest


def check_target(folder: Path, overwrite: bool) -> None:
    """Raises ValueError where `write_shards` would refuse `folder`: ask before hours of work."""
    if folder.exists() and not overwrite:
        raise ValueError(f"{folder} exists already; choose another folder or ask to overwrite it")
    if folder.exists() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise ValueError(
            f"{folder} holds files but no {MANIFEST}, so it is no data set and is not overwritten"
        )


class _SplitWriter:
    """The tars of one split, each of at most `max_samples` samples."""

    def __init__(self, folder: Path, split: str, max_samples: int, compress: bool):
        self.folder, self.split, self.max_samples, self.compress = folder, split, max_samples, compress
        self.counts: list[int] = []  # samples of each tar
        self.names: list[str] = []
        self.open_tar = ExitStack()
        self.writer: TarWriter | None = None

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        if self.writer is None or self.counts[-1] == self.max_samples:
            self.writer = self._next_tar()
        assert self.writer is not None
        self.writer.write({"__key__": key, **members})
        self.counts[-1] += 1

    def _next_tar(self) -> TarWriter:
        self.open_tar.close()
        self.names.append(f"{self.split}-{len(self.names):06d}.tar{'.gz' if self.compress else ''}")
        self.counts.append(0)
        stream: Any = self.open_tar.enter_context(open(self.folder / self.names[-1], "wb"))  # noqa: SIM115
        if self.compress:  # not webdataset's own compression, which writes the time into the file
            stream = self.open_tar.enter_context(gzip.GzipFile("", "wb", 9, stream, mtime=0))
        return self.open_tar.enter_context(TarWriter(stream, user="", group="", encoder=False, mtime=0))

    def finish(self) -> tuple[Shard, ...]:
        self.open_tar.close()
        paths = [self.folder / name for name in self.names]
        for path in paths:
            if not self.compress:
                write_index(path, scan_tar(path))
        return tuple(
            Shard(path.name, count, path.stat().st_size, _sha256(path))
            for path, count in zip(paths, self.counts, strict=True)
        )


def _write_tars(
    samples: Iterable[Sample],
    split_of: Callable[[Sample], str],
    picture_format: PictureFormat,
    new_writer: Callable[[str], _SplitWriter],
) -> tuple[dict[str, tuple[Shard, ...]], tuple[str, ...]]:
    writers: dict[str, _SplitWriter] = {}
    columns: set[str] = set()
    keys: set[str] = set()
    try:
        for sample in samples:
            if not sample.key or "." in sample.key or sample.key in keys:
                raise ValueError(f"a sample needs a key of its own without dots, not {sample.key!r}")
            keys.add(sample.key)
            split = split_of(sample)
            if split not in writers:
                writers[split] = new_writer(split)
            members = encode_sample(sample, picture_format)
            writers[split].write(sample.key, members)
            columns.update(suffix for suffix in members if not suffix[0].isdigit())
    finally:
        for writer in writers.values():
            writer.open_tar.close()
    if not writers:
        raise ValueError("no samples to write")
    return {split: writers[split].finish() for split in sorted(writers)}, tuple(sorted(columns))


# -- the manifest ----------------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a data set. Raises ValueError where there is none or it cannot be read."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} is no data set: it has no {MANIFEST}")
    return parse_manifest(path.read_bytes(), str(path))


def parse_manifest(data: bytes, where: str) -> Manifest:
    """A manifest from the bytes of its file. Raises ValueError, which begins with `where`, for anything else."""
    try:
        raw = json.loads(data)
        splits = {
            split: tuple(Shard(**shard) for shard in shards) for split, shards in raw.pop("splits").items()
        }
        lists = {name: tuple(raw.pop(name)) for name in ("columns", "licences")}
        return Manifest(splits=splits, **lists, **raw)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{where} is not a manifest of shards: {error}") from None


def verify(folder: Path) -> Manifest:
    """Compares every shard with the manifest, byte for byte. Raises ValueError for the first that differs."""
    manifest = read_manifest(folder)
    for shards in manifest.splits.values():
        for shard in shards:
            path = Path(folder) / shard.path
            check_size(path, shard)
            if (digest := _sha256(path)) != shard.sha256:
                raise ValueError(
                    f"{path} is damaged: its sha256 is {digest}, the manifest says {shard.sha256}"
                )
    return manifest


def check_size(path: Path, shard: Shard) -> None:
    """Raises ValueError where a shard is missing or has another size than its manifest says."""
    if not path.is_file():
        raise ValueError(f"{path} is missing, though the manifest lists it")
    if (num_bytes := path.stat().st_size) != shard.num_bytes:
        raise ValueError(
            f"{path} has {num_bytes} bytes where the manifest says {shard.num_bytes}: truncated or changed"
        )


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
