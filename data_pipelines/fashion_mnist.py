"""Fashion-MNIST, the full 60,000 + 10,000 pictures of clothing, out of Debian's package dataset-fashion-mnist."""

import gzip
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from PIL import Image

from data_pipelines.common import print_summary, progress, run, usable
from mmgen.data.rejects import Rejects
from mmgen.data.shards import Manifest, write_shards
from mmgen.sequence import Sample

# (caption, caption of the group) in the order of the labels.
CLASSES = (
    ("a t-shirt", "clothing"),
    ("trousers", "clothing"),
    ("a pullover", "clothing"),
    ("a dress", "clothing"),
    ("a coat", "clothing"),
    ("a sandal", "a shoe"),
    ("a shirt", "clothing"),
    ("a sneaker", "a shoe"),
    ("a bag", "a bag"),
    ("an ankle boot", "a shoe"),
)
FILES = {"train": "train", "test": "t10k"}
ATTRIBUTION = """# Whose data this is

Fashion-MNIST, H. Xiao, K. Rasul and R. Vollgraf, Zalando SE (arXiv 1708.07747), MIT licence.
"""


@dataclass(frozen=True)
class Options:
    """Where to read and to write."""

    out: Annotated[Path, tyro.conf.Positional]
    """Folder of the data set to write."""
    folder: Path = Path("/usr/share/datasets/fashion-mnist")
    """Folder of the four IDX files; Debian's package puts them in the default."""
    size: Literal[28, 32] = 32
    """Height and width in pixels; 32 adds a black border of 2."""
    compress: bool = True
    """Write .tar.gz: small members of a tar are mostly padding."""
    overwrite: bool = False
    """Replace a data set that exists in the folder."""


def read_idx(path: Path) -> np.ndarray:
    """The array of unsigned bytes of a gzipped IDX file. Raises ValueError where it is missing or damaged."""
    if not path.is_file():
        raise ValueError(
            f"{path} is missing; Debian: apt-get install dataset-fashion-mnist, else pass --folder"
        )
    try:
        with gzip.open(path) as stream:
            data = stream.read()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is no whole gzip file: {error}") from None
    # Magic: two zeros, the type (8 is unsigned byte), the number of axes; then each axis as a big-endian int32.
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is no IDX file of unsigned bytes: it starts with {data[:4].hex()}")
    start = 4 + 4 * data[3]
    shape = np.frombuffer(data[4:start], dtype=">i4")
    if len(shape) != data[3] or len(data) - start != np.prod(shape):
        raise ValueError(
            f"{path} is truncated: {len(data) - start} bytes where its header says {shape.tolist()}"
        )
    return np.frombuffer(data, dtype=np.uint8, offset=start).reshape(shape)


def samples_of(options: Options) -> Iterator[Sample]:
    """The samples of both splits; the border is the background's black."""
    border = (options.size - 28) // 2
    for split, name in FILES.items():
        pictures = read_idx(options.folder / f"{name}-images-idx3-ubyte.gz")
        labels = read_idx(options.folder / f"{name}-labels-idx1-ubyte.gz")
        if pictures.shape[1:] != (28, 28) or labels.shape != pictures.shape[:1] or labels.max(initial=0) > 9:
            raise ValueError(
                f"{options.folder} does not hold Fashion-MNIST: {pictures.shape} with labels {labels.shape}"
            )
        padded = np.pad(pictures, ((0, 0), (border, border), (border, border)))
        for index, (pixels, label) in enumerate(
            zip(progress(padded, split, len(padded)), labels, strict=True)
        ):
            caption, group = CLASSES[label]
            yield Sample(
                key=f"{split}-{index:05d}",
                shard="",
                captions={"group": group, "name": caption, "text": caption},
                picture=Image.fromarray(pixels).convert("RGB"),
                metadata={"label": int(label), "split": split},
            )


def build(options: Options) -> Manifest:
    """Writes the data set; prints what it holds."""
    rejects, counts = Rejects(), Counter()
    manifest = write_shards(
        options.out,
        usable(samples_of(options), rejects, str(options.folder), counts),
        lambda sample: sample.metadata["split"],
        name="fashion-mnist",
        description=f"Fashion-MNIST, {options.size} x {options.size} pixels, captioned by class",
        licences=["MIT"],
        attribution=ATTRIBUTION,
        max_samples_per_shard=5000,
        compress=options.compress,
        overwrite=options.overwrite,
    )
    print_summary(options.out, manifest, counts, rejects)
    return manifest


if __name__ == "__main__":
    sys.exit(run(Options, build))
