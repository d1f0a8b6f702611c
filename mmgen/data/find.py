"""Which shards a path names: data-set folders, folders and patterns of tars, pipes, web addresses, lists of these.

Only names and what a manifest says of them; opens no shard.
"""

import glob
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urljoin, urlsplit

from braceexpand import braceexpand

from mmgen.data.remote import RemoteConfig, is_remote, read_remote
from mmgen.data.shards import MANIFEST, Manifest, Shard, check_size, parse_manifest, read_manifest

Paths = str | Path | Sequence[str]


@dataclass(frozen=True)
class ShardFile:
    """A shard as it is opened: a local path, or an address; and what its manifest says of it, if it has one."""

    url: str
    known: Shard | None = None

    @property
    def path(self) -> Path | None:
        """Where it lies, None where it is not a local file."""
        return None if is_remote(self.url) else Path(self.url)

    @property
    def name(self) -> str:
        """What stays the same when its folder or server moves."""
        if self.known is not None:
            return self.known.path
        return self.url if self.url.startswith("pipe:") else urlsplit(self.url).path.rpartition("/")[2]

    @property
    def num_bytes(self) -> int | None:
        if self.known is not None:
            return self.known.num_bytes
        return self.path.stat().st_size if self.path is not None and self.path.is_file() else None


def find_shards(
    paths: Paths, split: str | None = None, remote: RemoteConfig | None = None
) -> list[ShardFile]:
    """The shards that `paths` names, in its order; those of a folder or a pattern in order of name.

    A path is a folder with a manifest, a folder of tars, a pattern (`*` or braces, as `{000..127}`), a web address of
    a tar or of a manifest (`.../manifest.json`, or `.../`), or `pipe:COMMAND`. With a manifest, `split` None means all
    splits. Without one there are no splits: there `split` must be None or "train". Raises ValueError where nothing is
    found, a shard is named twice, or one of a manifest is missing or truncated.
    """
    remote = remote or RemoteConfig()
    each = [str(paths)] if isinstance(paths, (str, Path)) else list(paths)
    found = [shard for path in each for name in _expand(path) for shard in _find(name, split, remote)]
    if not found:
        raise ValueError("no shards: the list of paths is empty")
    seen: set[str] = set()
    for shard in found:
        if shard.url in seen:
            raise ValueError(f"{shard.url} is named twice: give its source more weight instead")
        seen.add(shard.url)
    return found


def find_splits(paths: Paths, remote: RemoteConfig | None = None) -> list[str]:
    """The splits of the manifests that `paths` names, in order; ["train"] where there is none."""
    each = [str(paths)] if isinstance(paths, (str, Path)) else list(paths)
    found: dict[str, None] = {}
    for name in (name for path in each for name in _expand(path)):
        manifest = _manifest(name, remote or RemoteConfig())
        found |= dict.fromkeys(["train"] if manifest is None else manifest.splits)
    return list(found)


def describe(shards: Sequence[ShardFile]) -> dict[str, int | str]:
    """What a checkpoint keeps of a source, to know it again: how many shards and bytes, and a digest of all that is
    known of each (name, size, sha256), which stays the same when the whole moves."""
    lines = [
        f"{shard.name} {shard.num_bytes} {'' if shard.known is None else shard.known.sha256}"
        for shard in shards
    ]
    return {
        "shards": len(shards),
        "bytes": sum(shard.num_bytes or 0 for shard in shards),
        "digest": hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16],
    }


def _expand(path: str) -> Iterator[str]:
    """Braces, as a shell and WebDataset take them."""
    if "{" not in path or Path(path).exists():
        yield path
        return
    try:
        yield from braceexpand(path)
    except ValueError:
        raise ValueError(f"the braces of {path} do not match") from None


def _find(path: str, split: str | None, remote: RemoteConfig) -> Iterable[ShardFile]:
    manifest = _manifest(path, remote)
    if manifest is not None:
        if split is not None and split not in manifest.splits:
            raise ValueError(f"{path} has no split {split!r}, only {', '.join(manifest.splits)}")
        chosen = [
            shard for name, shards in manifest.splits.items() if split in (None, name) for shard in shards
        ]
        return [ShardFile(_place(path, shard), shard) for shard in chosen]
    if split not in (None, "train"):
        raise ValueError(f"{path} has no {MANIFEST}, so it has no split {split!r}, only train")
    if is_remote(path):
        return [ShardFile(path)]
    return [ShardFile(str(tar)) for tar in _local_tars(path.removeprefix("file://").removeprefix("file:"))]


def _manifest(path: str, remote: RemoteConfig) -> Manifest | None:
    if not is_remote(path):
        folder = Path(path)
        folder = folder.parent if folder.name == MANIFEST else folder
        return read_manifest(folder) if (folder / MANIFEST).is_file() else None
    if path.startswith("pipe:") or not urlsplit(path).path.endswith(("/", f"/{MANIFEST}")):
        return None
    url = _manifest_url(path)
    return parse_manifest(read_remote(url, remote), url)


def _manifest_url(path: str) -> str:
    return path if urlsplit(path).path.endswith(MANIFEST) else urljoin(path, MANIFEST)


def _place(path: str, shard: Shard) -> str:
    if is_remote(path):
        return urljoin(_manifest_url(path), shard.path)
    folder = Path(path).parent if Path(path).name == MANIFEST else Path(path)
    check_size(folder / shard.path, shard)
    return str(folder / shard.path)


def _local_tars(path: str) -> list[Path]:
    folder = Path(path)
    if folder.is_dir():
        found = sorted([*folder.glob("*.tar"), *folder.glob("*.tar.gz")])
    elif folder.is_file():
        found = [folder]
    else:
        found = [Path(name) for name in sorted(glob.glob(path)) if Path(name).is_file()]
    if not found:
        raise ValueError(
            f"no shards at {path}: expected a folder with {MANIFEST} or *.tar, or a pattern of tars"
        )
    return found
