"""Documents of several texts and pictures -> shards.

SOURCE is a JSONL file; each line is a document {"parts": [{"text": "..."}, {"picture": "a.png"}, ...]} in reading
order, with paths relative to the file. Other fields of the line become metadata.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from PIL import Image

from data_pipelines.common import check_share, print_summary, read_jsonl, run, split_by_hash, usable
from data_pipelines.pictures import PictureOptions, read_picture
from mmgen.data.codec import BrokenSample
from mmgen.data.rejects import Rejects
from mmgen.data.shards import Manifest, write_shards
from mmgen.sequence import Sample


@dataclass(frozen=True)
class Options:
    """What to read, how to prepare it, and where to write."""

    source: Annotated[Path, tyro.conf.Positional]
    """A .jsonl file of documents."""
    out: Annotated[Path, tyro.conf.Positional]
    """Folder of the data set to write."""
    pictures: Annotated[PictureOptions, tyro.conf.arg(name="")] = field(default_factory=PictureOptions)
    validation: float = 0.05
    """Share that is held out as the split `validation`, chosen by a hash of the document's line."""
    max_broken: float = 0.05
    """Share of unusable documents above which nothing is written."""
    overwrite: bool = False
    """Replace a data set that exists in the folder."""


def parts_of(raw: object, folder: Path, options: PictureOptions) -> tuple[str | Image.Image, ...]:
    """The texts and prepared pictures of a document. Raises BrokenSample: a document is usable whole or not at all."""
    if not isinstance(raw, list) or not raw:
        raise BrokenSample("bad parts")
    parts: list[str | Image.Image] = []
    for part in raw:
        match part:
            case {"text": str(text)} if text.strip():
                parts.append(text)
            case {"picture": str(file)}:
                parts.append(read_picture(folder / file, options))
            case _:
                raise BrokenSample("bad parts")
    return tuple(parts)


def samples_of(source: Path, options: PictureOptions, rejects: Rejects) -> Iterator[Sample]:
    """A sample per usable line."""
    for number, row in read_jsonl(source, rejects):
        try:
            parts = parts_of(row.pop("parts", None), source.parent, options)
        except BrokenSample as broken:
            rejects.reject(str(broken), f"{source}, line {number}")
            continue
        row.pop("captions", None)
        yield Sample(key=f"{number:08d}", shard="", parts=parts, metadata={**row, "line": number})


def build(options: Options) -> Manifest:
    """Writes the data set; prints what it holds."""
    check_share("--validation", options.validation)
    if not options.source.is_file():
        raise ValueError(f"{options.source} is no file; a .jsonl of documents is expected")
    rejects, counts = Rejects(max_rate=options.max_broken), Counter()
    samples = samples_of(options.source, options.pictures, rejects)
    manifest = write_shards(
        options.out,
        usable(samples, rejects, str(options.source), counts),
        lambda sample: split_by_hash(f"{options.source.name}:{sample.metadata['line']}", options.validation),
        name=options.source.stem,
        picture_format=options.pictures.picture_format,
        overwrite=options.overwrite,
    )
    print_summary(options.out, manifest, counts, rejects)
    return manifest


if __name__ == "__main__":
    sys.exit(run(Options, build))
