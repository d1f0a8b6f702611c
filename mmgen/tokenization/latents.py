"""Pictures <-> latents of zero mean and unit standard deviation per channel, whatever the codec.

Pixels pass as they are, or scaled by statistics; any diffusers autoencoder folder is read with the statistics stored
beside it. Forms no patches (the image modality does) and trains nothing (train_latents.py does).

Shape letters: B pictures, H W pixels, C latent channels, h w latent pixels.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from mmgen.files import write_text
from mmgen.tokenization.assets import CHECKSUMS, RECIPE, new_asset, sha256, verify_asset, write_checksums

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
STATISTICS = "statistics.json"
AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC")


class LatentCodec(ABC):
    """What the rest of mmgen sees of a picture codec."""

    channels: int
    """latent channels"""
    downsample: int
    """pixels per side of a latent pixel"""
    fingerprint: str
    """hexadecimal; two codecs with the same one give the same latents"""

    def __init__(self, channels: int, downsample: int, mean: Sequence[float], std: Sequence[float]) -> None:
        if len(mean) != channels or len(std) != channels or min(std) <= 0:
            raise ValueError(
                f"statistics of {len(mean)} means and {len(std)} deviations > 0 do not fit {channels} channels"
            )
        self.channels = channels
        self.downsample = downsample
        self._mean = torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1)
        self._std = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1)

    def encode(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        """Normalised latents, float32, of pictures in [-1, 1]; deterministic.

        Raises ValueError where the sides are no multiples of `downsample`.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ValueError(
                f"pictures have shape {tuple(pixels.shape)}; a codec needs [B, 3, H, W] in [-1, 1]"
            )
        if pixels.shape[2] % self.downsample or pixels.shape[3] % self.downsample:
            height, width = pixels.shape[2:]
            raise ValueError(
                f"a picture of {height}x{width} pixels: both must be multiples of {self.downsample}"
            )
        return (self._encode(pixels).float() - self._mean.to(pixels.device)) / self._std.to(pixels.device)

    def decode(self, latents: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        """Pictures in [-1, 1], float32, of normalised latents. Raises ValueError for other shapes."""
        if latents.ndim != 4 or latents.shape[1] != self.channels:
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}; this codec needs [B, {self.channels}, h, w]"
            )
        raw = latents.float() * self._std.to(latents.device) + self._mean.to(latents.device)
        return self._decode(raw).float().clamp(-1, 1)

    def compute_on(self, device: str | torch.device) -> None:  # noqa: B027 (without a network it makes no difference)
        """Lets a codec's network compute there; what goes in and comes out stays where the caller's tensors are."""

    @abstractmethod
    def _encode(self, pixels: Tensor) -> Tensor: ...

    @abstractmethod
    def _decode(self, latents: Tensor) -> Tensor: ...


class Pixels(LatentCodec):
    """The pictures themselves, a latent pixel per pixel: three channels, or one (grey) with statistics of one."""

    def __init__(
        self, mean: Sequence[float] = (0.0, 0.0, 0.0), std: Sequence[float] = (1.0, 1.0, 1.0)
    ) -> None:
        if len(mean) not in (1, 3):
            raise ValueError(f"pixels have 3 channels, or 1 where they are grey, not {len(mean)}")
        super().__init__(len(mean), 1, mean, std)
        self.fingerprint = f"pixels-{'-'.join(f'{value:g}' for value in (*mean, *std))}"

    def _encode(self, pixels: Tensor) -> Tensor:
        return _grey(pixels) if self.channels == 1 else pixels

    def _decode(self, latents: Tensor) -> Tensor:
        return latents.expand(-1, 3, -1, -1)


def _grey(pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 1 H W"]:
    return pixels.mean(1, keepdim=True)


class DiffusersAutoencoder(LatentCodec):
    """A folder as diffusers saves it (config.json, safetensors weights), with statistics.json beside.

    Variational ones give the mode of their posterior. The folder's own scaling_factor and shift_factor are not used:
    the statistics replace them. Raises ValueError where a file is missing, is damaged or is of another class.
    """

    def __init__(self, folder: Path | str) -> None:
        folder = Path(folder)
        verify_asset(folder)
        network = load_autoencoder(folder)
        mean, std = _read_statistics(folder)
        super().__init__(*_sizes(network.config), mean, std)
        weights = sorted(folder.glob("*.safetensors"))
        self.fingerprint = sha256(folder / CONFIG, folder / STATISTICS, *weights)
        # channels_last: 1.1 to 1.9 times as fast on a CPU, the more so the wider the picture.
        self.network = network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def compute_on(self, device: str | torch.device) -> None:
        self.network.to(device)

    def _encode(self, pixels: Tensor) -> Tensor:
        return posterior_mode(self.network, pixels.to(next(self.network.parameters()))).to(pixels.device)

    def _decode(self, latents: Tensor) -> Tensor:
        here = latents.to(next(self.network.parameters()))
        return self.network.decode(here, return_dict=False)[0].to(latents.device)


class CodecOutline(LatentCodec):
    """The channels and the downsampling of a codec that is not opened; no picture passes it."""

    def __init__(self, channels: int, downsample: int) -> None:
        super().__init__(channels, downsample, [0.0] * channels, [1.0] * channels)
        self.fingerprint = ""

    def _encode(self, pixels: Tensor) -> Tensor:
        raise ValueError("this is a codec's outline, which encodes nothing")

    def _decode(self, latents: Tensor) -> Tensor:
        raise ValueError("this is a codec's outline, which decodes nothing")


def _sizes(config: Mapping[str, Any]) -> tuple[int, int]:
    """Channels and downsampling of a diffusers autoencoder."""
    # Each of the three classes halves the sides between one width and the next.
    widths = config.get("block_out_channels") or config["encoder_block_out_channels"]
    return config["latent_channels"], 2 ** (len(widths) - 1)


def import_diffusers() -> Any:
    """The package diffusers. Raises ValueError where it is not installed."""
    try:
        import diffusers
    except ImportError:
        raise ValueError(
            "autoencoder latents need the package diffusers: pip install 'mmgen-pretrain[vae]'"
        ) from None
    return diffusers


def load_autoencoder(folder: Path) -> Any:
    """The diffusers network in `folder`, frozen, float32. Raises ValueError where it cannot be read."""
    name = _read_json(folder / CONFIG).get("_class_name")
    if name not in AUTOENCODERS:
        raise ValueError(
            f"{folder / CONFIG}: _class_name is {name!r}; it must be one of {', '.join(AUTOENCODERS)}"
        )
    if not any(folder.glob("*.safetensors")):
        making = f"; make it as its {RECIPE} says" if (folder / RECIPE).is_file() else ""
        raise ValueError(f"{folder} has no *.safetensors (pickled weights are not read){making}")
    diffusers = import_diffusers()
    try:
        network = getattr(diffusers, name).from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            torch_dtype=torch.float32,
            low_cpu_mem_usage=False,
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder} is no {name} that can be loaded: {' '.join(str(error).split())}"
        ) from None
    return network.eval().requires_grad_(False)


def posterior_mode(network: Any, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
    """Raw latents of a diffusers autoencoder: the mode of the posterior, or the code itself where there is none."""
    code = network.encode(pixels, return_dict=False)[0]
    return code if isinstance(code, Tensor) else code.mode()


def load_latent_codec(spec: str) -> LatentCodec:
    """The codec that `spec` names: "pixels", or a folder of a diffusers autoencoder or of `fit_pixels`. Raises
    ValueError.
    """
    if spec == "pixels":
        return Pixels()
    folder = Path(spec)
    if not folder.is_dir():
        raise ValueError(
            f"no latent codec {spec!r}: expected `pixels` or a folder of a diffusers autoencoder or of pixel statistics"
        )
    if (folder / CONFIG).is_file() and _read_json(folder / CONFIG).get("_class_name") == Pixels.__name__:
        verify_asset(folder)
        return Pixels(*_read_statistics(folder))
    return DiffusersAutoencoder(folder)


def outline_latent_codec(spec: str) -> LatentCodec:
    """The codec that `spec` names, of which only sizes are asked: of an autoencoder's folder config.json is enough.

    Raises ValueError where that is missing or does not say them.
    """
    if spec == "pixels":
        return Pixels()
    config = _read_json(Path(spec) / CONFIG)
    if config.get("_class_name") == Pixels.__name__:
        return load_latent_codec(spec)
    try:
        return CodecOutline(*_sizes(config))
    except (KeyError, TypeError):
        raise ValueError(
            f"{Path(spec) / CONFIG} does not say latent_channels and block_out_channels, so it is no autoencoder's"
        ) from None


def fit_statistics(folder: Path | str, batches: Iterable[Float[Tensor, "B 3 H W"]]) -> None:
    """Writes the mean and standard deviation of each latent channel over `batches` of pictures into `folder`.

    Needed once for a folder that comes from elsewhere. Raises ValueError for no pictures and for a constant channel.
    """
    folder = Path(folder)
    network = load_autoencoder(folder)
    _write_statistics(folder, (posterior_mode(network, pixels) for pixels in batches))
    if (folder / CHECKSUMS).is_file():
        write_checksums(folder)


def fit_pixels(
    folder: Path | str,
    batches: Iterable[Float[Tensor, "B 3 H W"]],
    grey: bool = False,
    overwrite: bool = False,
    recipe: dict[str, Any] | None = None,
) -> None:
    """Writes a folder that makes `Pixels` of zero mean and unit deviation over `batches` of pictures.

    Raises ValueError for no pictures, for a constant channel and where the folder may not be written.
    """
    with new_asset(folder, recipe or {}, overwrite) as new:
        write_text(new / CONFIG, json.dumps({"_class_name": Pixels.__name__}) + "\n")
        _write_statistics(new, (_grey(pixels) if grey else pixels for pixels in batches))


@torch.no_grad()
def _write_statistics(folder: Path, batches: Iterable[Float[Tensor, "B C h w"]]) -> None:
    count, num_pictures = 0, 0
    total = squares = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        latents = batch.double()
        count += latents[:, 0].numel()
        num_pictures += len(latents)
        total = total + latents.sum((0, 2, 3))
        squares = squares + latents.square().sum((0, 2, 3))
    if not num_pictures:
        raise ValueError("no pictures to fit statistics to")
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(0).sqrt()
    if not std.min() > 0:
        raise ValueError(f"a latent channel is constant over {num_pictures} pictures, so it has no scale")
    statistics = {"mean": mean.tolist(), "std": std.tolist(), "num_pictures": num_pictures}
    write_text(folder / STATISTICS, json.dumps(statistics, indent=1) + "\n")


def _read_statistics(folder: Path) -> tuple[list[float], list[float]]:
    if not (folder / STATISTICS).is_file():
        raise ValueError(f"{folder} has no {STATISTICS}; make it with `mmgen tokenizer fit-statistics`")
    statistics = _read_json(folder / STATISTICS)
    try:
        return [float(value) for value in statistics["mean"]], [float(value) for value in statistics["std"]]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{folder / STATISTICS} must hold lists of numbers `mean` and `std`") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return content


@torch.no_grad()
def reconstruct(
    codec: LatentCodec, pictures: UInt8[Tensor, "B 3 H W"], batch_size: int = 64
) -> UInt8[Tensor, "B 3 H W"]:
    """`pictures` (levels 0 to 255) through the codec and back."""
    return torch.cat(
        [to_levels(codec.decode(codec.encode(to_unit(part)))) for part in pictures.split(batch_size)]
    )


def psnr(originals: UInt8[Tensor, "B 3 H W"], others: UInt8[Tensor, "B 3 H W"]) -> tuple[float, float]:
    """Peak signal-to-noise ratio in dB: the mean of every picture's own, and that of the mean squared error.

    Pictures without an error count as 60 dB, beyond what 8 bits show; the second is infinite where none has any.
    """
    error = ((originals.double() - others.double()) / 255).square().mean((1, 2, 3))
    each = -10 * error.clamp_min(1e-6).log10()
    return each.mean().item(), -10 * error.mean().log10().item()


# -- pictures and tensors --------------------------------------------------------------------------------------------


def on_white(picture: Image.Image) -> Image.Image:
    """The picture as RGB, composited on white where it is transparent."""
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    if picture.mode.startswith("I;16"):  # convert("RGB") would clip all but the darkest to white
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    return picture.convert("RGB")


def to_unit(levels: UInt8[Tensor, "*B 3 H W"]) -> Float[Tensor, "*B 3 H W"]:
    """Levels 0 to 255 as values in [-1, 1]."""
    return levels.float() / 127.5 - 1


def to_levels(pixels: Float[Tensor, "*B 3 H W"]) -> UInt8[Tensor, "*B 3 H W"]:
    """The inverse of `to_unit`, rounded; values outside [-1, 1] are clamped."""
    return ((pixels.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def picture_to_tensor(picture: Image.Image) -> Float[Tensor, "3 H W"]:
    """The picture, over white, with values in [-1, 1]."""
    return to_unit(torch.from_numpy(np.array(on_white(picture))).permute(2, 0, 1))


def tensor_to_picture(pixels: Float[Tensor, "3 H W"]) -> Image.Image:
    """The inverse of `picture_to_tensor`; values outside [-1, 1] are clamped."""
    return Image.fromarray(to_levels(pixels.cpu()).permute(1, 2, 0).contiguous().numpy())
