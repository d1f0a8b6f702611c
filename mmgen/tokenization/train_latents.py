"""Trains a small autoencoder for pictures of one size and writes it as a diffusers folder.

The network is diffusers' AutoencoderDC (arXiv 2410.10733) without attention: its shortcuts between space and channels
let it start near a linear code, and it works at half of the resolution and below, which on a CPU counts most. Reads no
shards (the command does) and is not imported by the rest of mmgen.

Shape letters: B pictures, H W pixels, C latent channels, h w latent pixels.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmgen.config import fingerprint, to_mapping
from mmgen.files import sync_folder, write_text
from mmgen.rng import keyed_numpy, keyed_torch
from mmgen.tokenization.assets import check_new, new_asset
from mmgen.tokenization.augment import augment
from mmgen.tokenization.latents import (
    DiffusersAutoencoder,
    fit_statistics,
    import_diffusers,
    on_white,
    posterior_mode,
    psnr,
    reconstruct,
    to_levels,
    to_unit,
)

STATE = "state.safetensors"
LOG = "log.jsonl"
EMA = "ema."


@dataclass(frozen=True)
class LatentRecipe:
    """What decides the weights; the same recipe and pictures give the same bytes on one machine."""

    channels: int = 8
    """latent channels"""
    widths: tuple[int, ...] = (32, 32, 64, 128)
    """channels of the network at full resolution, a half, a quarter, ...; latents have the resolution of the last"""
    layers: tuple[int, ...] = (0, 1, 2, 2)
    """residual blocks at each resolution, in the encoder and in the decoder"""
    num_samples: int = 112_000
    """pictures to train on, counted with repetition"""
    batch_size: int = 16
    lr: float = 3e-3
    warmup: int = 4_000
    """pictures over which the learning rate rises; then it falls as a cosine"""
    weight_decay: float = 0.01
    ema: int = 10_000
    """pictures over which the averaged weights forget half"""
    edge_weight: float = 0.5
    """weight of the L1 error of the differences between neighbouring pixels, beside the L1 error of pixels"""
    noise: float = 0.05
    """standard deviation of the posterior: noise on the latents that the decoder learns from"""
    prior_weight: float = 1e-3
    """weight of the posterior's KL divergence from a standard normal: half the square of each latent value"""
    workers: int = 2
    """threads that share a batch; each computes alone, which on small networks beats threads within an operation"""
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.widths) != len(self.layers) or len(self.widths) < 2:
            raise ValueError(
                f"widths {self.widths} and layers {self.layers} need one entry per resolution, two at least"
            )
        # Stage 0 may be left out: the first convolution then goes straight to half the resolution.
        if min(self.layers[1:]) < 1 or self.layers[0] < 0:
            raise ValueError(f"layers {self.layers} must be at least 1, the first at least 0")
        if self.batch_size % self.workers:
            raise ValueError(f"batch_size {self.batch_size} must be a multiple of workers {self.workers}")
        if self.num_steps < 1:
            raise ValueError(f"num_samples {self.num_samples} is less than one batch of {self.batch_size}")

    @property
    def num_steps(self) -> int:
        return self.num_samples // self.batch_size

    def lr_at(self, step: int) -> float:
        """Linear warm-up, then a cosine to a hundredth of the peak."""
        seen = (step + 1) * self.batch_size
        share = min(1.0, step / self.num_steps)
        return self.lr * min(1.0, seen / max(1, self.warmup)) * (0.505 + 0.495 * math.cos(math.pi * share))


def build_autoencoder(recipe: LatentRecipe) -> Any:
    """The untrained network; its weights depend on the seed alone."""
    shortcut = recipe.widths[-1] % recipe.channels == 0  # averages equal groups of channels into one
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return import_diffusers().AutoencoderDC(
            latent_channels=recipe.channels,
            encoder_block_types="ResBlock",
            decoder_block_types="ResBlock",
            encoder_block_out_channels=recipe.widths,
            decoder_block_out_channels=recipe.widths,
            encoder_layers_per_block=recipe.layers,
            decoder_layers_per_block=recipe.layers,
            encoder_qkv_multiscales=((),) * len(recipe.widths),
            decoder_qkv_multiscales=((),) * len(recipe.widths),
            encoder_out_shortcut=shortcut,
            decoder_in_shortcut=shortcut,
        )


def stack_pictures(pictures: Iterable[Image.Image], size: int) -> UInt8[Tensor, "B 3 H W"]:
    """The pictures over white, those of another size resized to `size` x `size`. Raises ValueError for none."""
    rows = []
    for picture in pictures:
        picture = on_white(picture)
        if picture.size != (size, size):
            picture = picture.resize((size, size), Image.Resampling.LANCZOS)
        rows.append(torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(size, size, 3))
    if not rows:
        raise ValueError("no pictures to train a latent codec on")
    return torch.stack(rows).permute(0, 3, 1, 2).contiguous()


def train_latents(
    recipe: LatentRecipe,
    pictures: UInt8[Tensor, "N 3 H W"],
    held_out: UInt8[Tensor, "M 3 H W"],
    folder: Path | str,
    work: Path | str,
    save_every: int = 1000,
    overwrite: bool = False,
    provenance: Mapping[str, str] | None = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> tuple[float, float]:
    """Trains on `pictures`, writes the averaged weights to `folder` and returns what `psnr` says of `held_out`.

    `work` gets the checkpoint (every `save_every` steps, with the PSNR of `held_out`) and log.jsonl; a checkpoint that
    is there is continued, with the same result as an uncut run. `provenance` goes into recipe.yaml. `on_step` is called
    with the number of steps done and the mean losses. Raises ValueError for a folder that exists and for a checkpoint
    of another recipe.
    """
    check_new(folder, overwrite)
    trainer = LatentTrainer(recipe, pictures, Path(work))
    began = time.monotonic()
    while trainer.step < recipe.num_steps:
        losses = trainer.train_step()
        if on_step is not None:
            on_step(trainer.step, losses)
        if trainer.step % save_every == 0 or trainer.step == recipe.num_steps:
            trainer.save()
            each, of_mean = psnr(held_out, trainer.reconstruct(held_out))
            entry = {
                "step": trainer.step,
                "samples": trainer.step * recipe.batch_size,
                **losses,
                "psnr": each,
            }
            trainer.log({**entry, "psnr_of_mean": of_mean, "seconds": time.monotonic() - began})
    return trainer.write(folder, held_out, overwrite, provenance)


class LatentTrainer:
    """Weights, optimizer and averaged weights at one step; the step alone decides what every draw is."""

    def __init__(self, recipe: LatentRecipe, pictures: UInt8[Tensor, "N 3 H W"], work: Path) -> None:
        self.recipe = recipe
        self.pictures = pictures
        self.work = work
        self.step = 0
        side = 2 ** (len(recipe.widths) - 1)
        if pictures.shape[2] % side or pictures.shape[3] % side:
            raise ValueError(
                f"pictures of {tuple(pictures.shape[2:])} pixels: sides must be multiples of {side}"
            )
        self.network = build_autoencoder(recipe).to(memory_format=torch.channels_last)
        self._weights = dict(self.network.named_parameters())
        self._ema = {name: weight.detach().clone() for name, weight in self._weights.items()}
        # Not fused: that kernel takes weights and gradients to lie alike in memory, which channels_last breaks.
        self._optimizer = torch.optim.AdamW(
            self._weights.values(), lr=recipe.lr, betas=(0.9, 0.95), weight_decay=recipe.weight_decay
        )
        # With OpenMP a thread count belongs to the thread that sets it.
        self._pool = ThreadPoolExecutor(recipe.workers, initializer=torch.set_num_threads, initargs=(1,))
        if (work / STATE).is_file():
            self._load()

    def train_step(self) -> dict[str, float]:
        """One batch; returns its mean losses."""
        recipe = self.recipe
        draw = keyed_torch(recipe.seed, "augment", self.step)
        chosen = keyed_numpy(recipe.seed, "batch", self.step).integers(
            len(self.pictures), size=recipe.batch_size
        )
        pixels = augment(to_unit(self.pictures[torch.from_numpy(chosen)]), draw)
        shares = pixels.chunk(recipe.workers)
        results = list(self._pool.map(self._gradients, shares, range(len(shares))))
        # Summed in the order of the shares, not of who was first, so that a run repeats to the bit.
        for weight, *grads in zip(self._weights.values(), *(grads for grads, _ in results), strict=True):
            weight.grad = torch.stack(grads).mean(0)
        torch.nn.utils.clip_grad_norm_(self._weights.values(), 1.0)
        self._optimizer.param_groups[0]["lr"] = recipe.lr_at(self.step)
        self._optimizer.step()
        self.step += 1
        # An average over steps before it, never over more than half of the run so far.
        decay = min(0.5 ** (recipe.batch_size / recipe.ema), self.step / (self.step + 10))
        torch._foreach_lerp_(
            list(self._ema.values()), [w.detach() for w in self._weights.values()], 1 - decay
        )
        return {name: sum(losses[name] for _, losses in results) / len(results) for name in results[0][1]}

    def _gradients(self, pixels: Tensor, share: int) -> tuple[Sequence[Tensor], dict[str, float]]:
        recipe = self.recipe
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        generator = keyed_torch(recipe.seed, "noise", self.step, share)
        with torch.autocast("cpu", torch.bfloat16):
            latents = self.network.encode(pixels, return_dict=False)[0].float()
            noise = torch.randn(latents.shape, generator=generator) * recipe.noise
            output = self.network.decode(latents + noise, return_dict=False)[0].float()
        parts = {
            "pixel_loss": (output - pixels).abs().mean(),
            "edge_loss": sum((output - pixels).diff(dim=dim).abs().mean() for dim in (2, 3)),
            "prior_loss": latents.square().mean() / 2,
        }
        loss = (
            parts["pixel_loss"]
            + recipe.edge_weight * parts["edge_loss"]
            + recipe.prior_weight * parts["prior_loss"]
        )
        grads = torch.autograd.grad(loss, list(self._weights.values()))
        return grads, {"loss": loss.item(), **{name: float(part.detach()) for name, part in parts.items()}}

    # -- state ---------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Writes the checkpoint: one safetensors file, whole or not at all."""
        tensors = {name: weight.detach() for name, weight in self._weights.items()}
        tensors |= {EMA + name: weight for name, weight in self._ema.items()}
        for name, weight in self._weights.items():
            tensors |= {
                f"optimizer.{key}.{name}": value for key, value in self._optimizer.state[weight].items()
            }
        header = {"step": str(self.step), "recipe": fingerprint(self.recipe), "pictures": self._digest()}
        self.work.mkdir(parents=True, exist_ok=True)
        beside = self.work / f".{STATE}.{os.getpid()}.partial"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside, header)
        os.replace(beside, self.work / STATE)
        sync_folder(self.work)

    def _load(self) -> None:
        path = self.work / STATE
        try:
            with safe_open(path, "pt") as file:
                header = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
        if (header["recipe"], header["pictures"]) != (fingerprint(self.recipe), self._digest()):
            raise ValueError(
                f"{path} is of another recipe or other pictures; choose another work folder or remove it"
            )
        self.step = int(header["step"])
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.copy_(tensors[name])
                self._ema[name].copy_(tensors[EMA + name])
                keys = ("step", "exp_avg", "exp_avg_sq")
                self._optimizer.state[weight] = {key: tensors[f"optimizer.{key}.{name}"] for key in keys}
        if (
            self.work / LOG
        ).is_file():  # lines that a cut run wrote after its last checkpoint are written again
            lines = (self.work / LOG).read_text(encoding="utf-8").splitlines(keepends=True)
            write_text(
                self.work / LOG, "".join(line for line in lines if json.loads(line)["step"] <= self.step)
            )

    def _digest(self) -> str:
        """Tells one set of pictures from another without reading all of it."""
        return f"{tuple(self.pictures.shape)} {int(self.pictures[:: max(1, len(self.pictures) // 64)].long().sum())}"

    def log(self, entry: dict[str, float]) -> None:
        """Appends a line to log.jsonl."""
        with open(self.work / LOG, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    # -- result --------------------------------------------------------------------------------------------------------

    def averaged(self) -> Any:
        """A network with the averaged weights, in evaluation mode."""
        network = build_autoencoder(self.recipe)
        network.load_state_dict(self._ema)
        return network.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    @torch.no_grad()
    def reconstruct(self, pictures: UInt8[Tensor, "B 3 H W"]) -> UInt8[Tensor, "B 3 H W"]:
        """`pictures` through the averaged weights, rounded to 8 bits."""
        network = self.averaged()

        def run(part: Tensor) -> Tensor:
            return to_levels(network.decode(posterior_mode(network, to_unit(part)), return_dict=False)[0])

        return torch.cat(list(self._pool.map(run, pictures.split(32))))

    def write(
        self,
        folder: Path | str,
        held_out: UInt8[Tensor, "M 3 H W"],
        overwrite: bool = False,
        provenance: Mapping[str, str] | None = None,
    ) -> tuple[float, float]:
        """Writes the averaged weights (float16), statistics, recipe and checksums; returns the PSNR of `held_out`."""
        recipe: dict[str, Any] = {**(provenance or {}), "recipe": to_mapping(self.recipe)}
        with new_asset(folder, recipe, overwrite) as beside:
            self.averaged().half().save_pretrained(beside)
            fit_statistics(beside, map(to_unit, self.pictures.split(64)))
            each, of_mean = psnr(held_out, reconstruct(DiffusersAutoencoder(beside), held_out))
            recipe |= {
                "trained_on": {"pictures": len(self.pictures), "steps": self.step},
                "held_out": {
                    "pictures": len(held_out),
                    "psnr": round(each, 2),
                    "psnr_of_mean": round(of_mean, 2),
                },
            }
        return each, of_mean
