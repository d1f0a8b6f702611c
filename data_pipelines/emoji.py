"""Builds captioned emoji pictures in six styles from their npm packages.

Splits are by hash and the same whichever sets and tones are chosen: `unseen_concepts` holds base concepts out in every
style and tone; `unseen_pairs` holds out (concept, style) pairs whose concept is trained in other styles; the rest is
`train`. Everyday concepts (configs/emoji_everyday.txt) are never held out as a whole.
"""

import hashlib
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from data_pipelines.common import hash_share, npm_packages, print_summary, progress, run, usable
from data_pipelines.emoji_captions import captions
from data_pipelines.emoji_sources import (
    NAMES,
    SETS,
    STYLES,
    Drawing,
    EmojiSet,
    read_names,
    read_set,
)
from mmgen.data.rejects import Rejects
from mmgen.data.shards import Manifest, check_target, write_shards
from mmgen.sequence import Sample
from mmgen.tokenization.latents import on_white

ASSETS = Path(__file__).parent / "assets"
EVERYDAY = Path(__file__).parent.parent / "configs" / "emoji_everyday.txt"
UNSEEN_CONCEPTS = 0.05  # of the base concepts
# Share of the concepts that are held out in ONE of the six styles: 6 % of the pairs. One style at most, so that every
# everyday concept is trained in at least four others.
UNSEEN_PAIRS = 0.36


@dataclass(frozen=True)
class Options:
    """What to build, and where."""

    out: Annotated[Path, tyro.conf.Positional]
    """Folder of the data set to write."""
    size: int = 64
    """Height and width of the pictures in pixels."""
    sets: tuple[str, ...] = STYLES
    """Styles to draw, of noto, noto-v1, twemoji, fluent-flat, fluent-3d, emojione."""
    tones: bool = True
    """Draw the skin tones too."""
    everyday: bool = False
    """Only the concepts of configs/emoji_everyday.txt."""
    packages: Path | None = None
    """Folder where npm installs the packages, or has installed them; default: the user's cache."""
    compress: bool = False
    """Write .tar.gz: a third of the size on disk, as small members of a tar are mostly padding."""
    overwrite: bool = False
    """Replace a data set that exists in the folder."""


def read_everyday() -> frozenset[str]:
    """The slugs of the everyday concepts."""
    lines = EVERYDAY.read_text(encoding="utf-8").splitlines()
    return frozenset(line.strip() for line in lines if line.strip() and not line.startswith("#"))


def split_of(concept: str, style: str, everyday: frozenset[str]) -> str:
    """The split of all tones of a (concept, style) pair; a pure function of the names."""
    common = concept in everyday
    if not common and hash_share("emoji", "concept", concept) < UNSEEN_CONCEPTS:
        return "unseen_concepts"
    if hash_share("emoji", "has unseen style", concept) < UNSEEN_PAIRS:
        unseen_style = min(
            STYLES, key=lambda candidate: hash_share("emoji", "unseen style", concept, candidate)
        )
        if style == unseen_style:
            return "unseen_pairs"
    return "train"


def select(options: Options, modules: Path, rejects: Rejects) -> list[Drawing]:
    """The drawings that `options` ask for, bases before tones and old before new.

    Of two pictures that are the same the first is kept: the yellow hand rather than a tone that was not drawn, the
    flag of France rather than that of Clipperton Island, which looks the same.
    """
    everyday = read_everyday()
    names = read_names(modules)
    if options.everyday:
        names = [name for name in names if name.concept in everyday]
    drawings: list[Drawing] = []
    for emoji_set in _chosen(options):
        found, num_unnamed = read_set(emoji_set, modules, names)
        drawings += found
        for _ in range(0 if options.everyday else num_unnamed):
            rejects.reject("no name", emoji_set.package)
    if not options.tones:
        drawings = [drawing for drawing in drawings if not drawing.name.tone]
    return sorted(drawings, key=lambda drawing: (bool(drawing.name.tone), drawing.name.version))


def samples_of(drawings: Sequence[Drawing], size: int, rejects: Rejects) -> Iterator[Sample]:
    """Draws; leaves out blank pictures, and pictures that the same style has under another name."""
    licences = {emoji_set.style: emoji_set for emoji_set in SETS}
    everyday = read_everyday()
    trained = {
        drawing.name.concept
        for drawing in drawings
        if split_of(drawing.name.concept, drawing.style, everyday) == "train"
    }
    seen: set[tuple[str, bytes]] = set()
    for drawing in progress(drawings, "drawing"):
        name, style = drawing.name, drawing.style
        where = f"{licences[style].package}: {name.name}"
        split = split_of(name.concept, style, everyday)
        if split == "unseen_pairs" and name.concept not in trained:
            rejects.reject("held-out pair with no other style", where)
            continue
        try:
            picture = on_white(drawing.draw(size))
        except (ValueError, OSError):
            rejects.reject("cannot be drawn", where)
            continue
        if all(low == high for low, high in picture.getextrema()):  # pyright: ignore[reportGeneralTypeIssues]
            rejects.reject("blank", where)
            continue
        digest = (style, hashlib.blake2b(picture.tobytes(), digest_size=16).digest())
        if digest in seen:
            rejects.reject("duplicate picture", where)
            continue
        seen.add(digest)
        tones = name.tone if isinstance(name.tone, list) else [name.tone] if name.tone else []
        yield Sample(
            key="-".join([style, name.concept, *(f"tone{tone}" for tone in tones)]),
            shard="",
            captions=captions(name.name, style, name.tags, name.group, name.subgroup),
            picture=picture,
            metadata={
                "name": name.name,
                "tags": list(name.tags),
                "group": name.group,
                "concept": name.concept,
                "style": style,
                "tone": name.tone,
                "licence": licences[style].licence,
                "source": licences[style].package,
            },
        )


def attribution(sets: Sequence[EmojiSet]) -> str:
    """ATTRIBUTION.md of the chosen sets, with the licence texts that have to travel with their art."""
    lines = ["# Whose art this is", "", "The pictures are rasterized on white and otherwise unchanged.", ""]
    lines += ["| style | authors | licence | package | source |", "|---|---|---|---|---|"]
    for emoji_set in sets:
        package = f"{emoji_set.package} {emoji_set.version}"
        lines.append(
            f"| {emoji_set.style} | {emoji_set.authors} | {emoji_set.licence} | {package} | {emoji_set.url} |"
        )
    lines += ["", f"Names, tags and groups: {NAMES[0]} {NAMES[1]}, (c) Miles Johnson, MIT."]
    licences = {emoji_set.licence for emoji_set in sets}
    if "CC-BY-4.0" in licences:
        lines += ["", "CC-BY-4.0: https://creativecommons.org/licenses/by/4.0/"]
    lines += ["", "## MIT", "", (ASSETS / "MIT.txt").read_text(encoding="utf-8").strip()]
    if "Apache-2.0" in licences:
        lines += ["", "## Apache-2.0", "", (ASSETS / "Apache-2.0.txt").read_text(encoding="utf-8").strip()]
    return "\n".join(lines) + "\n"


def _chosen(options: Options) -> list[EmojiSet]:
    if unknown := set(options.sets) - set(STYLES):
        raise ValueError(f"no emoji set is called {min(unknown)}; there are {', '.join(STYLES)}")
    if not options.sets:
        raise ValueError(f"--sets needs at least one of {', '.join(STYLES)}")
    return [emoji_set for emoji_set in SETS if emoji_set.style in options.sets]


def build(options: Options) -> Manifest:
    """Fetches, draws and writes the data set; prints what it holds."""
    if not 8 <= options.size <= 1024:
        raise ValueError(f"--size must be between 8 and 1024 pixels, not {options.size}")
    sets = _chosen(options)
    check_target(options.out, options.overwrite)
    sources = dict([(emoji_set.package, emoji_set.version) for emoji_set in sets] + [NAMES])
    modules = npm_packages(sources, options.packages)
    rejects = Rejects(max_rate=1.0)
    drawings = select(options, modules, rejects)
    everyday, counts = read_everyday(), Counter()
    drawn = usable(samples_of(drawings, options.size, rejects), rejects, "the emoji packages", counts)
    samples = sorted(drawn, key=lambda sample: hash_share("order", sample.key))
    manifest = write_shards(
        options.out,
        samples,
        lambda sample: split_of(sample.metadata["concept"], sample.metadata["style"], everyday),
        name="emoji",
        description=f"Captioned emoji, {options.size} x {options.size} pixels on white",
        licences=sorted({emoji_set.licence for emoji_set in sets}),
        sources=sources,
        attribution=attribution(sets),
        compress=options.compress,
        overwrite=options.overwrite,
    )
    print_summary(options.out, manifest, counts, rejects)
    concepts = {sample.metadata["concept"] for sample in samples}
    chosen = [sample for sample in samples if sample.metadata["concept"] in everyday]
    held = sum(
        split_of(s.metadata["concept"], s.metadata["style"], everyday) == "unseen_pairs" for s in chosen
    )
    print(f"{len(concepts):,} base concepts; everyday: {len(chosen):,} pictures, {held} of them unseen pairs")
    return manifest


if __name__ == "__main__":
    sys.exit(run(Options, build))
