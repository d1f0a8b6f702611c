"""One sample <-> its tar members: pictures, captions, latents, interleaved parts.

Everything that can be wrong inside one sample is found here and has a reason. Opens no files.
"""

import io
import json
import struct
import zlib
from collections.abc import Mapping
from functools import lru_cache
from math import prod
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

from mmgen.sequence import Sample
from mmgen.tokenization.latents import on_white

PICTURES = ("webp", "png", "jpg", "jpeg")
MAX_PIXELS = 1 << 26  # a picture of 8192 x 8192; what claims more is an error or a decompression bomb

# Asking all decoders of Pillow in turn takes longer than decoding a small picture.
FORMATS = ("WEBP", "PNG", "JPEG", "GIF", "BMP", "TIFF")

PictureFormat = Literal["webp", "png", "jpg"]


class BrokenSample(Exception):
    """A sample that cannot be used; the message is the reason it is counted under."""


def encode_sample(sample: Sample, picture_format: PictureFormat = "webp") -> dict[str, bytes]:
    """The tar members of a sample: suffix -> bytes."""
    members: dict[str, bytes] = {}
    metadata = dict(sample.metadata)
    levels = {level: caption for level, caption in sample.captions.items() if level != "text"}
    if sample.picture is not None:
        members[picture_format] = _encode_picture(sample.picture, picture_format)
    if "text" in sample.captions:
        members["txt"] = sample.captions["text"].encode()
    if sample.latents is not None:
        stream = io.BytesIO()
        np.save(stream, sample.latents, allow_pickle=False)
        members["latents.npy"] = stream.getvalue()
    if sample.parts:
        parts, num_pictures = [], 0
        for part in sample.parts:
            if isinstance(part, str):
                parts.append({"text": part})
                continue
            suffix = f"{num_pictures}.{picture_format}"
            members[suffix] = _encode_picture(part, picture_format)
            parts.append({"picture": suffix})
            num_pictures += 1
        metadata["parts"] = parts
    if levels:
        metadata["captions"] = levels
    if metadata:
        members["json"] = json.dumps(metadata, ensure_ascii=False, sort_keys=True).encode()
    return members


def _encode_picture(picture: Image.Image, picture_format: PictureFormat) -> bytes:
    stream = io.BytesIO()
    if picture_format == "webp":
        picture.save(stream, "WEBP", lossless=True, quality=80, method=4)
    elif picture_format == "png":
        picture.save(stream, "PNG", optimize=True)
    else:
        on_white(picture).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def decode_sample(group: Mapping[str, Any], max_pixels: int = MAX_PIXELS) -> Sample:
    """A `Sample` from the members that webdataset grouped. Raises BrokenSample with the reason."""
    metadata = _decode_json(group["json"]) if "json" in group else {}
    levels = metadata.pop("captions", None) or {}
    if not isinstance(levels, dict) or not all(isinstance(caption, str) for caption in levels.values()):
        raise BrokenSample("bad captions")
    if not all(_is_unicode(caption) for caption in levels.values()):
        raise BrokenSample("text is not utf-8")
    captions = {level: caption for level, caption in levels.items() if caption.strip()}
    if "txt" in group and (text := _decode_text(group["txt"])).strip():
        captions["text"] = text
    suffix = next((suffix for suffix in PICTURES if suffix in group), None)
    picture = decode_picture(group[suffix], max_pixels) if suffix else None
    latents = _decode_latents(group["latents.npy"]) if "latents.npy" in group else None
    parts = _decode_parts(metadata.pop("parts", None), group, max_pixels)
    if not parts and not captions:
        raise BrokenSample("missing caption")
    return Sample(
        key=group["__key__"],
        shard=group["__url__"],
        captions=captions,
        picture=picture,
        latents=latents,
        parts=parts,
        metadata=metadata,
    )


def decode_picture(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An upright RGB picture, over white where it is transparent. Raises BrokenSample."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            if picture.width * picture.height > max_pixels:
                raise BrokenSample("picture too large")
            picture.load()
            ImageOps.exif_transpose(picture, in_place=True)
            return on_white(picture)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BrokenSample("picture too large") from None
    except (
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        zlib.error,
        struct.error,
        TypeError,
        AttributeError,
    ):  # what Pillow's decoders raise on broken bytes
        raise BrokenSample("corrupt picture") from None


def _decode_text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise BrokenSample("text is not utf-8") from None


def _is_unicode(text: str) -> bool:
    """Whether it can be written as UTF-8: JSON may escape half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _decode_json(data: bytes) -> dict[str, Any]:
    try:
        metadata = json.loads(data)
    except (ValueError, RecursionError):
        raise BrokenSample("bad json") from None
    if not isinstance(metadata, dict):
        raise BrokenSample("bad json")
    return metadata


def _decode_latents(data: bytes) -> np.ndarray:
    try:
        latents = _load_array(data)
    except (ValueError, OSError, EOFError):
        raise BrokenSample("bad latents") from None
    if latents.ndim != 3 or latents.dtype not in (np.float16, np.float32) or not np.isfinite(latents).all():
        raise BrokenSample("bad latents")
    return latents


def _load_array(data: bytes) -> np.ndarray:
    """What `np.load` gives; reading the header, alike in all samples of a set, takes it longer than all the rest."""
    start = 10 + int.from_bytes(data[8:10], "little")
    if data[:8] != b"\x93NUMPY\x01\x00" or len(data) < start:
        return np.load(io.BytesIO(data), allow_pickle=False)
    shape, fortran, dtype = _array_header(data[8:start])
    if dtype.hasobject:
        raise ValueError("an array of objects is never unpickled")
    values = np.frombuffer(data, dtype, prod(shape), start)
    return values.reshape(shape, order="F" if fortran else "C").copy()  # one that may be written to


@lru_cache(maxsize=256)
def _array_header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    return np.lib.format.read_array_header_1_0(io.BytesIO(data))


def _decode_parts(raw: object, group: Mapping[str, Any], max_pixels: int) -> tuple[str | Image.Image, ...]:
    if raw is None:
        return ()
    if not isinstance(raw, list) or not raw:
        raise BrokenSample("bad parts")
    parts: list[str | Image.Image] = []
    for part in raw:
        match part:
            case {"text": str(text)} if _is_unicode(text):
                parts.append(text)
            case {"picture": str(name)} if name in group:
                parts.append(decode_picture(group[name], max_pixels))
            case {"picture": str()}:
                raise BrokenSample("missing picture of a part")
            case _:
                raise BrokenSample("bad parts")
    return tuple(parts)
