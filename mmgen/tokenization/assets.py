"""Tokenizer folders: a model file, how it was made, and a checksum of both. Written whole, verified when loaded."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from mmgen.files import sync_folder, write_text

CHECKSUMS = "SHA256SUMS"
RECIPE = "recipe.yaml"


@contextmanager
def new_asset(folder: Path | str, recipe: dict[str, Any], overwrite: bool = False) -> Iterator[Path]:
    """A folder beside `folder` to write into; at the end it gets its recipe and checksums and takes the name.

    Raises ValueError where `folder` exists (with `overwrite`: exists and is no tokenizer folder).
    """
    folder = Path(folder)
    check_new(folder, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    beside.mkdir()
    try:
        yield beside
        (beside / RECIPE).write_text(dump_yaml(recipe), encoding="utf-8")
        write_checksums(beside)
        for path in beside.iterdir():
            path.chmod(0o644)  # safetensors writes for its owner alone
        old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
        if folder.exists():
            folder.rename(old)
        beside.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def check_new(folder: Path | str, overwrite: bool = False) -> None:
    """Raises ValueError where an asset may not be written to `folder`: to be called before hours of training."""
    folder = Path(folder)
    if folder.exists() and not overwrite:
        raise ValueError(f"{folder} exists already; choose another folder or ask to overwrite it")
    if folder.exists() and any(folder.iterdir()) and not (folder / CHECKSUMS).is_file():
        raise ValueError(
            f"{folder} holds files but no {CHECKSUMS}, so it is no tokenizer and is not overwritten"
        )


def write_checksums(folder: Path) -> None:
    """Writes SHA256SUMS of every file in `folder`, in the format of `sha256sum`."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != CHECKSUMS)
    write_text(folder / CHECKSUMS, "".join(f"{sha256(folder / name)}  {name}\n" for name in names))


def verify_asset(folder: Path) -> None:
    """Compares the files with SHA256SUMS; a folder without one (made elsewhere) passes. Raises ValueError."""
    if not (folder / CHECKSUMS).is_file():
        return
    for line in (folder / CHECKSUMS).read_text(encoding="utf-8").splitlines():
        expected, _, name = line.partition("  ")
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing, though {CHECKSUMS} lists it")
        if (found := sha256(folder / name)) != expected:
            raise ValueError(
                f"{folder / name} is damaged: its sha256 is {found}, {CHECKSUMS} says {expected}"
            )


def sha256(*paths: Path) -> str:
    """Hexadecimal SHA-256 of the files' bytes, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def dump_yaml(mapping: dict[str, Any]) -> str:
    """The mapping as YAML, in its own order."""
    return yaml.safe_dump(mapping, sort_keys=False, allow_unicode=True, width=120)
