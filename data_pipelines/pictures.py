"""Picture files of a user, made ready for shards: decoded upright on white, resized and cropped."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mmgen.data.codec import MAX_PIXELS, BrokenSample, PictureFormat, decode_picture


@dataclass(frozen=True)
class PictureOptions:
    """How pictures are prepared."""

    size: int | None = None
    """Resize so that the shorter side has this many pixels; smaller pictures are left out. Default: as they are."""
    multiple: int = 16
    """Crop around the centre so that both sides are multiples of this: the pixels of one token."""
    square: bool = False
    """Crop to a square around the centre."""
    max_pixels: int = MAX_PIXELS
    """Pictures that claim more pixels than this are left out without decoding them."""
    picture_format: PictureFormat = "webp"
    """Format in the shards: webp and png are lossless, jpg has quality 95."""

    def __post_init__(self) -> None:
        if self.multiple < 1:
            raise ValueError(f"multiple must be at least 1 pixel, not {self.multiple}")
        if self.size is not None and (self.size < self.multiple or self.size % self.multiple):
            raise ValueError(f"size {self.size} must be a multiple of {self.multiple} pixels")


def read_picture(path: Path, options: PictureOptions) -> Image.Image:
    """The prepared picture. Raises BrokenSample with the reason."""
    try:
        data = path.read_bytes()
    except OSError:
        raise BrokenSample("missing picture") from None
    return fit(decode_picture(data, options.max_pixels), options)


def fit(picture: Image.Image, options: PictureOptions) -> Image.Image:
    """Resizes the shorter side to `size` and crops around the centre. Raises BrokenSample for what is too small."""
    width, height = picture.size
    shorter = min(width, height)
    if shorter < (options.size or options.multiple):
        raise BrokenSample("picture too small")
    if options.size is not None and shorter != options.size:
        width, height = (round(side * options.size / shorter) for side in (width, height))
        picture = picture.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
    crop_width, crop_height = (side - side % options.multiple for side in (width, height))
    if options.square:
        crop_width = crop_height = min(crop_width, crop_height)
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return picture.crop((left, top, left + crop_width, top + crop_height))
