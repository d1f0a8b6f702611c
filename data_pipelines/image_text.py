"""Your own pictures and captions -> shards.

SOURCE is a folder (a.jpg with its caption in a.txt beside it, subfolders too), or a table: a CSV file with a header or
a JSONL file, with a column of picture paths (relative to the table) and a column of captions.
"""

import csv
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from data_pipelines.common import check_share, print_summary, progress, read_jsonl, run, split_by_hash, usable
from data_pipelines.pictures import PictureOptions, read_picture
from mmgen.data.codec import BrokenSample
from mmgen.data.rejects import Rejects
from mmgen.data.shards import Manifest, write_shards
from mmgen.sequence import Sample

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}


@dataclass(frozen=True)
class Options:
    """What to read, how to prepare it, and where to write."""

    source: Annotated[Path, tyro.conf.Positional]
    """A folder of pictures with .txt files, a .csv or a .jsonl."""
    out: Annotated[Path, tyro.conf.Positional]
    """Folder of the data set to write."""
    pictures: Annotated[PictureOptions, tyro.conf.arg(name="")] = field(default_factory=PictureOptions)
    picture_column: str = "picture"
    """Column of a table that holds the picture's path."""
    caption_column: str = "caption"
    """Column of a table that holds the caption; all other columns become metadata."""
    validation: float = 0.05
    """Share that is held out as the split `validation`, chosen by a hash of the picture's path."""
    max_broken: float = 0.05
    """Share of unusable entries above which nothing is written."""
    name: str | None = None
    """Name of the data set; default: that of the source."""
    overwrite: bool = False
    """Replace a data set that exists in the folder."""


@dataclass(frozen=True)
class Entry:
    """One picture and its caption before either is looked at."""

    file: str
    path: Path
    caption: str
    metadata: dict[str, Any]


def entries_of_folder(folder: Path, rejects: Rejects) -> Iterator[Entry]:
    """Pictures with a .txt beside them, in order of path."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise ValueError(f"{folder} has no pictures ({', '.join(sorted(SUFFIXES))})")
    for path in progress(paths, "pictures"):
        try:
            caption = path.with_suffix(".txt").read_text(encoding="utf-8")
        except FileNotFoundError:
            rejects.reject("missing caption", str(path))
        except UnicodeDecodeError:
            rejects.reject("text is not utf-8", str(path))
        else:
            yield Entry(path.relative_to(folder).as_posix(), path, caption, {})


def entries_of_table(table: Path, options: Options, rejects: Rejects) -> Iterator[Entry]:
    """Rows of a CSV or JSONL file. Raises ValueError where the file has no such columns or is not utf-8."""
    for place, row in _csv_rows(table, options) if table.suffix == ".csv" else read_jsonl(table, rejects):
        file, caption = row.pop(options.picture_column, None), row.pop(options.caption_column, None)
        if not isinstance(file, str) or not file:
            rejects.reject("missing picture", f"{table}, line {place}")
        elif not isinstance(caption, str):
            rejects.reject("missing caption", f"{table}, line {place}")
        else:
            yield Entry(file, table.parent / file, caption, row)


def _csv_rows(table: Path, options: Options) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with open(table, encoding="utf-8-sig", newline="") as stream:
            rows = csv.DictReader(stream)
            wanted = {options.picture_column, options.caption_column}
            if missing := wanted - set(rows.fieldnames or ()):
                raise ValueError(
                    f"{table} has no column {min(missing)!r}, only {', '.join(rows.fieldnames or ())}"
                )
            for row in rows:
                row.pop(None, None)  # pyright: ignore[reportArgumentType]  # cells beyond the header
                yield rows.line_num, dict(row)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{table} is no CSV file in utf-8: {error}") from None


def samples_of(entries: Iterator[Entry], options: PictureOptions, rejects: Rejects) -> Iterator[Sample]:
    """Samples of the entries whose caption and picture are usable."""
    for index, entry in enumerate(entries):
        try:
            if not (caption := entry.caption.strip()):
                raise BrokenSample("missing caption")
            picture = read_picture(entry.path, options)
        except BrokenSample as broken:
            rejects.reject(str(broken), str(entry.path))
            continue
        metadata = {key: value for key, value in entry.metadata.items() if key not in ("captions", "parts")}
        yield Sample(
            key=f"{index:08d}",
            shard="",
            captions={"text": caption},
            picture=picture,
            metadata={**metadata, "file": entry.file},
        )


def build(options: Options) -> Manifest:
    """Writes the data set; prints what it holds."""
    check_share("--validation", options.validation)
    rejects, counts, source = Rejects(max_rate=options.max_broken), Counter(), options.source
    if source.is_dir():
        entries = entries_of_folder(source, rejects)
    elif source.is_file() and source.suffix in (".csv", ".jsonl"):
        entries = entries_of_table(source, options, rejects)
    else:
        raise ValueError(f"{source} is neither a folder nor a .csv or .jsonl file")
    manifest = write_shards(
        options.out,
        usable(samples_of(entries, options.pictures, rejects), rejects, str(source), counts),
        lambda sample: split_by_hash(sample.metadata["file"], options.validation),
        name=options.name or source.stem,
        picture_format=options.pictures.picture_format,
        overwrite=options.overwrite,
    )
    print_summary(options.out, manifest, counts, rejects)
    return manifest


if __name__ == "__main__":
    sys.exit(run(Options, build))
