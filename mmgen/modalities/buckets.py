"""Pictures of any size -> a few sizes: resized to cover the nearest one and cut around the centre.

Sizes are (height, width) in pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

from PIL import Image


@dataclass(frozen=True)
class BucketConfig:
    sizes: tuple[tuple[int, int], ...] = ()
    """heights and widths in pixels that pictures are brought to; none: pictures are taken as they are"""
    max_enlarged: float = 1.0
    """how many times larger a side may become; a picture too small for every size is left out"""

    def __post_init__(self) -> None:
        if len(set(self.sizes)) < len(self.sizes) or any(min(size) < 1 for size in self.sizes):
            raise ValueError(f"sizes {self.sizes} must be different pairs of at least 1 pixel")
        if self.max_enlarged < 1:
            raise ValueError(f"max_enlarged {self.max_enlarged} must be at least 1: 1 enlarges nothing")


def choose_bucket(height: int, width: int, config: BucketConfig) -> tuple[int, int] | None:
    """The size with the nearest aspect ratio (by the difference of their logarithms) among those that the picture can
    cover without being enlarged too much; of several such the largest. None where it can cover none."""
    fitting = [size for size in config.sizes if cover(height, width, size) <= config.max_enlarged]
    return min(fitting, key=lambda size: _order(height, width, size), default=None)


def cover(height: int, width: int, size: tuple[int, int]) -> float:
    """How many times a picture is enlarged to cover `size`."""
    return max(size[0] / height, size[1] / width)


def fit(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture at `size`: the middle of it that has this aspect ratio, resized with antialiasing; itself where it
    has that size already."""
    height, width = size
    if picture.size == (width, height):
        return picture
    scale = cover(picture.height, picture.width, size)
    left, top = (picture.width - width / scale) / 2, (picture.height - height / scale) / 2
    # within the picture, whatever the rounding
    right, bottom = min(picture.width - left, picture.width), min(picture.height - top, picture.height)
    box = max(left, 0.0), max(top, 0.0), right, bottom
    return picture.resize((width, height), Image.Resampling.BICUBIC, box=box)


def _order(height: int, width: int, size: tuple[int, int]) -> tuple[float, int]:
    return round(abs(log(width / height) - log(size[1] / size[0])), 9), -size[0] * size[1]


def check_buckets(sizes: Sequence[tuple[int, int]], side: int, max_tokens: int) -> None:
    """Raises ValueError where a size makes no whole tokens of `side` pixels, or more than `max_tokens` on a side."""
    for size in sizes:
        if size[0] % side or size[1] % side:
            raise ValueError(
                f"buckets.sizes: {list(size)} must be multiples of {side} pixels, the side of a token"
            )
        if max(size) // side > max_tokens:
            raise ValueError(
                f"buckets.sizes: {list(size)} has more than the {max_tokens} tokens a side that the tokenizer has"
            )
