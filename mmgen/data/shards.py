"""WebDataset shards on disk: written with a manifest, read back as `Sample`s.

A data set is a folder: `manifest.json` and `<split>-000000.tar`, ... A sample with key K (no dots) has the members
K.webp|png|jpg (picture), K.txt (the plain caption), K.json (metadata; "captions" maps a level of detail to a caption),
K.latents.npy (float16 or float32 [channels, height, width]) and, for an interleaved document, K.json's "parts" with
the pictures in K.0.webp, K.1.webp, ... Folders of tars in img2dataset's layout have no manifest and are read as they
are. Nothing here mixes, shuffles, resizes or tokenizes.
"""

import glob
import gzip
import hashlib
import json
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from webdataset.gopen import gopen
from webdataset.tariterators import group_by_keys, tar_file_iterator
from webdataset.writer import TarWriter

from mmgen.data.codec import MAX_PIXELS, BrokenSample, PictureFormat, decode_sample, encode_sample
from mmgen.data.rejects import Rejects
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


# -- finding ---------------------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a data set. Raises ValueError where there is none or it cannot be read."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} is no data set: it has no {MANIFEST}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        splits = {
            split: tuple(Shard(**shard) for shard in shards) for split, shards in raw.pop("splits").items()
        }
        lists = {name: tuple(raw.pop(name)) for name in ("columns", "licences")}
        return Manifest(splits=splits, **lists, **raw)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not a manifest of shards: {error}") from None


def verify(folder: Path) -> Manifest:
    """Compares every shard with the manifest, byte for byte. Raises ValueError for the first that differs."""
    manifest = read_manifest(folder)
    for shards in manifest.splits.values():
        for shard in shards:
            path = Path(folder) / shard.path
            _check_size(path, shard)
            if (digest := _sha256(path)) != shard.sha256:
                raise ValueError(
                    f"{path} is damaged: its sha256 is {digest}, the manifest says {shard.sha256}"
                )
    return manifest


def find_shards(path: str | Path, split: str | None = None) -> list[Path]:
    """The tars of a split of a data set, of a folder of tars without manifest, or of a glob; in order of name.

    With a manifest, `split` None means all splits. A folder or glob without manifest has no splits: there `split`
    must be None or "train". Raises ValueError where nothing is found, or a shard is missing or truncated.
    """
    folder = Path(path)
    if (folder / MANIFEST).is_file():
        manifest = read_manifest(folder)
        if split is not None and split not in manifest.splits:
            raise ValueError(f"{folder} has no split {split!r}, only {', '.join(manifest.splits)}")
        shards = [
            shard for name, group in manifest.splits.items() if split in (None, name) for shard in group
        ]
        for shard in shards:
            _check_size(folder / shard.path, shard)
        return [folder / shard.path for shard in shards]
    if split not in (None, "train"):
        raise ValueError(f"{path} has no {MANIFEST}, so it has no split {split!r}, only train")
    if folder.is_dir():
        found = sorted([*folder.glob("*.tar"), *folder.glob("*.tar.gz")])
    else:
        found = [Path(name) for name in sorted(glob.glob(str(path))) if Path(name).is_file()]
    if not found:
        raise ValueError(
            f"no shards at {path}: expected a folder with {MANIFEST} or *.tar, or a pattern of tars"
        )
    return found


def _check_size(path: Path, shard: Shard) -> None:
    if not path.is_file():
        raise ValueError(f"{path} is missing, though the manifest lists it")
    if (num_bytes := path.stat().st_size) != shard.num_bytes:
        raise ValueError(
            f"{path} has {num_bytes} bytes where the manifest says {shard.num_bytes}: truncated or changed"
        )


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# -- reading ---------------------------------------------------------------------------------------------------------


def read_shards(
    paths: Iterable[str | Path], rejects: Rejects, max_pixels: int = MAX_PIXELS
) -> Iterator[Sample]:
    """One pass over several shards. Raises ValueError where not one sample is usable or too much is broken."""
    paths = list(paths)
    for path in paths:
        yield from read_shard(path, rejects, max_pixels)
    rejects.finish(f"{paths[0]} ... {paths[-1]}" if len(paths) > 1 else ", ".join(map(str, paths)))


def read_shard(path: str | Path, rejects: Rejects, max_pixels: int = MAX_PIXELS) -> Iterator[Sample]:
    """The samples of one tar (a file, or what webdataset opens: "pipe:...", a URL), in order.

    Broken samples, and a shard that is missing, empty, truncated or no tar, are counted in `rejects` by reason and
    left out; ValueError when that is too much. A picture above `max_pixels` is refused from its header, undecoded.
    """
    num_groups = 0
    groups = group_by_keys(_members(str(path)))
    while True:
        try:
            group = next(groups, None)
        except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError) as error:
            return rejects.reject_shard(_shard_reason(error, num_groups), str(path))
        if group is None:
            break
        num_groups += 1
        try:
            sample = decode_sample(group, max_pixels)
        except BrokenSample as broken:
            rejects.reject(str(broken), f"{path}: {group['__key__']}")
            continue
        rejects.keep()
        yield sample
    if num_groups == 0:
        rejects.reject_shard("empty shard", str(path))
    elif _cut_short(Path(path)):
        rejects.reject_shard("truncated shard", str(path))
    else:
        rejects.keep_shard()


def _members(url: str) -> Iterator[dict[str, Any]]:
    with gopen(url) as stream:
        for member in tar_file_iterator(stream):  # pyright: ignore[reportArgumentType]  # it opens the stream itself
            yield {**member, "__url__": url}
    yield {}  # what group_by_keys takes for the end of a shard


def _shard_reason(error: Exception, num_groups: int) -> str:
    if isinstance(error, FileNotFoundError):
        return "missing shard"
    if isinstance(error, ValueError):
        return "two members of one name"  # group_by_keys refuses them
    if "empty file" in str(error):
        return "empty shard"
    return "truncated shard" if num_groups else "not a tar"


def _cut_short(path: Path) -> bool:
    """Whether a plain tar lacks its closing zeros: tarfile takes one that was cut between members for whole."""
    if path.suffix != ".tar" or not path.is_file():
        return False
    with open(path, "rb") as stream:
        stream.seek(-1024, os.SEEK_END)
        return any(stream.read())
