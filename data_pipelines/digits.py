"""Handwritten digits of 8x8 pixels with captions in words, out of scikit-learn: a data set for trying things out."""

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from data_pipelines.common import check_share, print_summary, run, usable
from mmgen.data.rejects import Rejects
from mmgen.data.shards import Manifest, write_shards
from mmgen.sequence import Sample

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ATTRIBUTION = """# Whose data this is

Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, CC-BY-4.0;
the test part, as scikit-learn (BSD-3-Clause) ships it. Grey levels 0 to 16 are stretched to 0 to 255.
"""


@dataclass(frozen=True)
class Options:
    """Where to write, and how much to hold out."""

    out: Annotated[Path, tyro.conf.Positional]
    """Folder of the data set to write."""
    validation: float = 0.15
    """Share of each digit that is held out as the split `validation`."""
    overwrite: bool = False
    """Replace a data set that exists in the folder."""


def samples_of(pixels: np.ndarray, labels: np.ndarray) -> Iterator[Sample]:
    """A sample per digit; `pixels` [N, 8, 8] from 0 to 16."""
    for index, (digit, label) in enumerate(zip(pixels, labels, strict=True)):
        word = WORDS[label]
        named = f"{'an' if word == 'eight' else 'a'} {word}"
        yield Sample(
            key=f"digit-{index:04d}",
            shard="",
            captions={
                "group": "a digit",
                "name": named,
                "long": f"the digit {word}, written by hand",
                "text": named,
            },
            picture=Image.fromarray(np.rint(digit * (255 / 16)).astype(np.uint8)).convert("RGB"),
            metadata={"digit": int(label), "index": index},
        )


def build(options: Options) -> Manifest:
    """Writes the data set; prints what it holds."""
    check_share("--validation", options.validation)
    pixels, labels = (np.asarray(array) for array in load_digits(return_X_y=True))
    held_out: set[int] = set()
    if options.validation > 0:
        indices = np.arange(len(labels))
        split = train_test_split(indices, test_size=options.validation, stratify=labels, random_state=0)
        held_out = {int(index) for index in split[1]}
    rejects, counts = Rejects(), Counter()
    manifest = write_shards(
        options.out,
        usable(samples_of(pixels.reshape(-1, 8, 8), labels), rejects, "load_digits", counts),
        lambda sample: "validation" if sample.metadata["index"] in held_out else "train",
        name="digits",
        description="Handwritten digits, 8 x 8 pixels, captioned in words",
        licences=["CC-BY-4.0"],
        attribution=ATTRIBUTION,
        picture_format="png",
        overwrite=options.overwrite,
    )
    print_summary(options.out, manifest, counts, rejects)
    return manifest


if __name__ == "__main__":
    sys.exit(run(Options, build))
