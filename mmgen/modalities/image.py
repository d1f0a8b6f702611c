"""Pictures: patches of latents, after two size tokens (height and width in tokens). A picture ends by count."""

from collections import OrderedDict
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise, starmap
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL.Image import Image as Picture
from torch import Tensor, nn

from mmgen.modalities.base import MissingPart, Modality, Place, text_positions
from mmgen.modalities.buckets import BucketConfig, check_buckets, choose_bucket, fit
from mmgen.rng import draw_index
from mmgen.sequence import Sample, Span
from mmgen.tokenization.latents import (
    LatentCodec,
    load_latent_codec,
    outline_latent_codec,
    picture_to_tensor,
)
from mmgen.tokenization.text import TextTokenizer


@dataclass(frozen=True)
class TimeConfig:
    """The distribution of training times: uniform on [0, 1], or the sigmoid of a normal (arXiv 2403.03206).

    A sigmoid of a normal hardly ever comes near t = 1, where sampling begins. Flow matching does not mind; a jump that
    is to reach far from there must have been trained there.
    """

    kind: Literal["uniform", "logit_normal"] = "uniform"
    mean: float = 0.0
    std: float = 1.0
    uniform: float = 0.0
    """share of a logit-normal's draws that are uniform instead"""

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise ValueError(f"std {self.std} must be positive")
        if not 0 <= self.uniform <= 1:
            raise ValueError(f"uniform {self.uniform} must be in [0, 1]: it is a share")


@dataclass(frozen=True)
class BlocksConfig:
    """In how many autoregressive blocks a picture is drawn: bands of rows, top to bottom.

    The number is drawn anew for every document of training. One model then serves all of `counts`; it should see few
    blocks most, since more of them cost quality (CausalFusion, arXiv 2412.12095).
    """

    counts: tuple[int, ...] = (1,)
    weights: tuple[float, ...] | None = None
    """how often each count is drawn; None: each half as often as the one before"""

    def __post_init__(self) -> None:
        if not self.counts or min(self.counts) < 1 or len(set(self.counts)) < len(self.counts):
            raise ValueError(f"counts {self.counts} must be different numbers of at least 1")
        if self.weights is not None and (
            len(self.weights) != len(self.counts) or min(self.weights) < 0 or not sum(self.weights)
        ):
            raise ValueError(
                f"weights {self.weights} must be one number >= 0 for each of the counts {self.counts}, and not all 0"
            )

    def draw(self, draw: np.random.Generator) -> int:
        if len(self.counts) == 1:
            return self.counts[0]
        weights = self.weights or [0.5**i for i in range(len(self.counts))]
        return self.counts[draw_index(weights, draw)]


@dataclass(frozen=True)
class ImageConfig:
    codec: str = "pixels"
    """`pixels`, or a folder of a diffusers autoencoder or of pixel statistics"""
    patch: int = 2
    """side of a token, in latent pixels"""
    copies: int = 1
    """noisy copies of each picture, with noise and times of their own; they share one context"""
    context_noise: float = 0.05
    """time t at which finished pictures enter the context, in training and in sampling"""
    time: TimeConfig = field(default_factory=TimeConfig)
    blocks: BlocksConfig = field(default_factory=BlocksConfig)
    buckets: BucketConfig = field(default_factory=BucketConfig)
    """sizes that pictures are brought to; stored latents are taken as they are"""
    loss_weight: float = 1.0
    cache_mb: int = 1024
    """latents encoded on the fly are kept up to this size; encode larger sets once with `mmgen tokenizer encode`"""

    def __post_init__(self) -> None:
        if self.patch < 1:
            raise ValueError(f"patch {self.patch} must be at least 1")
        if self.copies < 1:
            raise ValueError(f"copies {self.copies} must be at least 1")
        if not 0 <= self.context_noise < 1:
            raise ValueError(f"context_noise {self.context_noise} must be in [0, 1)")


class PatchEmbedding(nn.Module):
    """Values by a linear map, plus sines and cosines of the token's row and column in its picture.

    Rotary positions are relative: without the sum a noisy token would have to find its place in the picture from what
    it reads of the size tokens.
    """

    frequency: Tensor

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        if width % 4:
            raise ValueError(f"width {width} must be a multiple of 4: sines and cosines of two axes")
        self.values = nn.Linear(channels, width)
        frequency = 1e4 ** (-torch.arange(width // 4) / (width // 4))
        self.register_buffer("frequency", frequency, persistent=False)

    def forward(
        self, values: Float[Tensor, "... D"], positions: Int[Tensor, "... 3"]
    ) -> Float[Tensor, "... W"]:
        place = positions[..., 1:] - positions[..., :1]
        angles = (place[..., None] * self.frequency).flatten(-2)
        return self.values(values) + torch.cat([angles.sin(), angles.cos()], dim=-1)


class Image(Modality):
    Config = ImageConfig

    def __init__(
        self, name: str, config: ImageConfig, tokenizer: TextTokenizer, codec: LatentCodec | None = None
    ) -> None:
        super().__init__(name, config, tokenizer)
        self.codec = load_latent_codec(config.codec) if codec is None else codec
        self.channels = self.codec.channels * config.patch**2
        check_buckets(config.buckets.sizes, config.patch * self.codec.downsample, tokenizer.max_size)
        self._cache: OrderedDict[tuple[str, str], np.ndarray] = OrderedDict()
        self._cache_bytes = 0

    @classmethod
    def outline(cls, name: str, config: ImageConfig, tokenizer: TextTokenizer) -> "Image":
        return cls(name, config, tokenizer, outline_latent_codec(config.codec))

    @property
    def copies(self) -> int:
        return self.config.copies

    def encode(self, sample: Sample, place: Place, draw: np.random.Generator) -> list[Span]:
        values, height, width = self.patchify(self.latents(sample))
        if max(height, width) > self.tokenizer.max_size:
            raise MissingPart(f"picture of more than {self.tokenizer.max_size} tokens a side", sample.key)
        size = self.size_span(height, width, place.start, predicted=not place.first)
        blocks = min(self.config.blocks.draw(draw), height)  # at most one a row
        start = size.next_position
        return [size, self.span(values, height, width, start, draw, read=not place.last, blocks=blocks)]

    def build_embedding(self, width: int) -> nn.Module:
        return PatchEmbedding(self.channels, width)

    def latents(self, sample: Sample) -> Float[Tensor, "D h w"]:
        """The sample's latents: stored ones, else encoded here and remembered."""
        if sample.latents is not None:
            channels, height, width = sample.latents.shape
            patch = self.config.patch
            if channels != self.codec.channels or not height * width or height % patch or width % patch:
                shape = f"{channels} x {height} x {width}"
                wanted = f"{self.codec.channels} channels in patches of {patch}"
                raise MissingPart(f"latents of {shape}, not of {wanted}", sample.key)
            return torch.from_numpy(np.asarray(sample.latents, dtype=np.float32))
        if sample.picture is None:
            raise MissingPart("missing picture", sample.key)
        name = (sample.shard, sample.key)
        if name not in self._cache:
            picture = self._sized(sample.picture, sample.key)
            with torch.no_grad():
                latents = self.codec.encode(picture_to_tensor(picture)[None])[0]
            self._remember(name, latents.to(torch.float16).numpy())
        return torch.from_numpy(self._cache[name]).float()

    def _sized(self, picture: Picture, key: str) -> Picture:
        """The picture at the size at which it is trained on."""
        if self.config.buckets.sizes:
            size = choose_bucket(picture.height, picture.width, self.config.buckets)
            if size is None:
                raise MissingPart("picture too small for every bucket", key)
            return fit(picture, size)
        side = self.config.patch * self.codec.downsample
        if picture.width % side or picture.height % side:
            raise MissingPart(f"picture whose sides are no multiples of {side} pixels", key)
        return picture

    def _remember(self, name: tuple[str, str], latents: np.ndarray) -> None:
        self._cache[name] = latents
        self._cache_bytes += latents.nbytes
        while self._cache_bytes > self.config.cache_mb * 2**20 and len(self._cache) > 1:
            self._cache_bytes -= self._cache.popitem(last=False)[1].nbytes

    def patchify(self, latents: Float[Tensor, "D h w"]) -> tuple[Float[Tensor, "N C"], int, int]:
        """Latents of unit variance -> tokens of standard deviation sigma_data in raster order; rows and columns."""
        channels, height, width = latents.shape
        side = self.config.patch
        if height % side or width % side:
            raise MissingPart(f"latents of {height}x{width} do not divide into patches of {side}", "picture")
        rows, columns = height // side, width // side
        # numpy takes less time than torch where there is so little to do
        parts = (
            latents.numpy(force=True).reshape(channels, rows, side, columns, side).transpose(1, 3, 0, 2, 4)
        )
        tokens = parts.reshape(rows * columns, -1) * np.float32(self.sigma_data)
        return torch.from_numpy(tokens), rows, columns

    def unpatchify(self, tokens: Float[Tensor, "N C"], height: int, width: int) -> Float[Tensor, "D h w"]:
        """The inverse of `patchify`."""
        side = self.config.patch
        latents = (tokens / self.sigma_data).reshape(height, width, -1, side, side).permute(2, 0, 3, 1, 4)
        return latents.reshape(-1, height * side, width * side)

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens of a picture of height x width pixels. Raises ValueError for other sizes."""
        side = self.config.patch * self.codec.downsample
        if height % side or width % side or min(height, width) < side:
            raise ValueError(f"a picture of {height}x{width} pixels: both must be multiples of {side}")
        return height // side, width // side

    def size_span(self, height: int, width: int, start: int, predicted: bool) -> Span:
        """Two text tokens, [height][width]; not predicted where the picture begins its document (the size is given)."""
        return _pair(self.tokenizer.height(height), self.tokenizer.width(width), start, predicted)

    def span(
        self,
        values: Float[Tensor, "N C"],
        height: int,
        width: int,
        start: int,
        draw: np.random.Generator,
        read: bool,
        predicted: bool = True,
        blocks: int = 1,
    ) -> Span:
        """A whole picture, in `blocks` bands, from its tokens; `draw` is for the noise of what a later token reads."""
        committed = self.commit(values, draw) if read or blocks > 1 else None
        positions = self.positions(height, width, start)
        lengths = tuple(band.stop - band.start for band in bands(height, width, blocks))
        return Span(self.name, positions, None, values, committed, lengths, self.copies, predicted, read)

    def noisy_band(self, height: int, width: int, start: int, band: slice) -> Span:
        """A band of a picture yet to be drawn: positions and shape, no values."""
        positions = self.positions(height, width, start)[band]
        empty = torch.zeros(len(positions), self.channels)
        return Span(self.name, positions, None, empty, None, (len(empty),), read=False)

    def finished_band(
        self, noisy: Span, values: Float[Tensor, "N C"], committed: Float[Tensor, "N C"]
    ) -> Span:
        """The band for later ones to read, as `committed` (see `commit`)."""
        return Span(self.name, noisy.positions, None, values, committed, noisy.blocks, predicted=False)

    def positions(self, height: int, width: int, start: int) -> Int[np.ndarray, "N 3"]:
        """[height * width, 3]: (start, start + row, start + column), raster order; read-only, as others share it."""
        return _grid(height, width, start)

    def commit(self, values: Float[Tensor, "N C"], draw: np.random.Generator) -> Float[Tensor, "N C"]:
        noise = torch.from_numpy(draw.standard_normal(values.shape, dtype=np.float32)).to(values)
        t = self.config.context_noise
        return (1 - t) * values + t * self.sigma_data * noise

    def draw_time(self, draw: np.random.Generator) -> float:
        time = self.config.time
        if time.kind == "uniform" or (time.uniform and draw.random() < time.uniform):
            return float(draw.random())
        return float(1 / (1 + np.exp(-draw.normal(time.mean, time.std))))


# Here and below: a few sizes and places come again in document after document.
@lru_cache(maxsize=1024)
def bands(height: int, width: int, blocks: int) -> tuple[slice, ...]:
    """The tokens of each of `blocks` bands of rows, top to bottom, as even as they can be.

    Raises ValueError where there are fewer rows.
    """
    if not 1 <= blocks <= height:
        raise ValueError(f"blocks {blocks}: a picture of {height} rows of tokens has 1 to {height}")
    edges = [width * round(height * i / blocks) for i in range(blocks + 1)]
    return tuple(starmap(slice, pairwise(edges)))


@lru_cache(maxsize=1024)
def _pair(first: int, second: int, start: int, predicted: bool) -> Span:
    return Span("text", text_positions(start, 2), np.array([first, second]), predicted=predicted)


@lru_cache(maxsize=1024)
def _grid(height: int, width: int, start: int) -> np.ndarray:
    rows, columns = np.divmod(np.arange(height * width), width)
    positions = np.stack([np.zeros_like(rows), rows, columns], axis=-1) + start
    positions.setflags(write=False)
    return positions
