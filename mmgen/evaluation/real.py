"""The real side of an evaluation: samples of a split of a run's data, as the pictures and prompts that are compared.

Reads data; measures nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from PIL import Image

from mmgen.data.find import find_splits
from mmgen.data.source import SourceConfig
from mmgen.data.streams import SampleStream
from mmgen.rng import keyed_numpy
from mmgen.sequence import Sample
from mmgen.tokenization.latents import on_white

SEEN = "seen"  # what a report calls the split "train"
MAX_PICTURES = 20_000  # of one split: more would not move a figure by its interval


@dataclass(frozen=True)
class RealPicture:
    """A real picture with its prompt (the plain caption), what it shows and in which style.

    `name` is the caption of the concept alone. Data without the metadata `concept` has one concept per caption;
    data without `style` is cut into two halves by key, so that a measure which leaves a picture's own style out
    works everywhere."""

    key: str
    picture: Image.Image
    prompt: str
    name: str
    concept: str
    style: str
    captions: Mapping[str, str] = field(default_factory=dict)
    """by level of detail"""


def splits_of(sources: Mapping[str, SourceConfig]) -> list[str]:
    """The splits that the sources have, training first, under their names in reports."""
    found: dict[str, None] = {SEEN: None}
    for source in sources.values():
        splits = find_splits(source.path, source.remote)
        found |= dict.fromkeys(name for name in splits if name != "train")
    return list(found)


def read_split(source: SourceConfig, split: str, limit: int = MAX_PICTURES) -> list[Sample]:
    """Up to `limit` samples of a split, in an order that is the same in every run; [] where the source lacks
    the split.

    The source's `include` lists hold, except where they leave nothing of a held-out split: a model trained on a few
    concepts is asked for unseen ones that are on no list."""
    if split not in splits_of({"": source}):
        return []
    config = replace(source, split="train" if split == SEEN else split, thin={})
    try:
        return _read(config, limit)
    except ValueError:
        if split == SEEN or not config.include:
            raise
        return _read(replace(config, include={}), limit)


def _read(config: SourceConfig, limit: int) -> list[Sample]:
    # The name keys the order: not the path, which moves. One window, so that the first ones are of the whole split.
    stream = SampleStream("evaluation", replace(config, window=MAX_PICTURES), seed=0)
    return list(islice(stream.epoch(), limit))


def real_pictures(samples: Sequence[Sample], size: tuple[int, int]) -> list[RealPicture]:
    """Those samples that have a picture and a caption; pictures over white, at `size` (height, width)."""
    return [
        _real_picture(sample, sample.picture, size)
        for sample in samples
        if sample.picture is not None and "text" in sample.captions
    ]


def _real_picture(sample: Sample, picture: Image.Image, size: tuple[int, int]) -> RealPicture:
    prompt = sample.captions["text"]
    picture = on_white(picture)
    height, width = size
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    half = f"half {keyed_numpy('half', sample.key).integers(2)}"
    return RealPicture(
        key=sample.key,
        picture=picture,
        prompt=prompt,
        name=sample.captions.get("name", prompt),
        concept=str(sample.metadata.get("concept", prompt)),
        style=str(sample.metadata.get("style", half)),
        captions=sample.captions,
    )
