"""`mmgen tokenizer ...`: trains text and latent tokenizers, and puts latents into shards.

Joins the readers of data sets with mmgen.tokenization, which knows no data set.
"""

import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mmgen.cli.arguments import parse
from mmgen.data.find import find_shards
from mmgen.data.read import read_shards
from mmgen.data.rejects import Rejects
from mmgen.data.shards import MANIFEST, Manifest, read_manifest, write_shards
from mmgen.sequence import Sample
from mmgen.tokenization.latents import (
    LatentCodec,
    fit_pixels,
    fit_statistics,
    load_latent_codec,
    picture_to_tensor,
)
from mmgen.tokenization.text import train_text
from mmgen.tokenization.train_latents import LatentRecipe, stack_pictures, train_latents

PROG = "mmgen tokenizer"


@dataclass(frozen=True)
class TrainText:
    """Trains a SentencePiece tokenizer on the captions and texts of data sets."""

    data: tuple[str, ...]
    """folders of shards; every caption of every sample is a text"""
    out: Path
    """folder to write"""
    vocab_size: int = 2048
    """ids in all, special ones and 256 bytes included"""
    max_size: int = 64
    """the largest picture side, in latent tokens, that gets a size token"""
    split: str = "train"
    """which split of the data sets"""
    max_texts: int = 30_000
    """texts of each data set, evenly spaced where it has more, so that a large one does not drown a small one"""
    overwrite: bool = False
    """replace a tokenizer in `out`"""


@dataclass(frozen=True)
class TrainLatents:
    """Trains a small autoencoder on the pictures of a data set; cut off, the same command goes on."""

    data: str
    """a folder of shards"""
    out: Path
    """folder to write"""
    work: Path
    """folder of the checkpoint and log.jsonl"""
    size: int = 64
    """pixels per side; pictures of other sizes are resized"""
    split: str = "train"
    """split to train on"""
    held_out: str = "unseen_concepts"
    """split to measure on"""
    save_every: int = 500
    """steps between checkpoints"""
    overwrite: bool = False
    """replace a tokenizer in `out`"""
    recipe: LatentRecipe = field(default_factory=LatentRecipe)


@dataclass(frozen=True)
class FitStatistics:
    """Stores the mean and deviation of each latent channel beside a diffusers autoencoder from elsewhere."""

    latents: Path
    """folder of the autoencoder"""
    data: str
    """a folder of shards with pictures of the sizes that it will be used for"""
    split: str = "train"
    """which split"""
    num_pictures: int = 2000
    """how many pictures to measure"""


@dataclass(frozen=True)
class FitPixels:
    """Makes a codec of the pixels themselves, scaled to zero mean and unit deviation: for pictures of a few pixels."""

    data: str
    """a folder of shards"""
    out: Path
    """folder to write"""
    grey: bool = False
    """one channel, the mean of the three"""
    split: str = "train"
    """which split"""
    num_pictures: int = 2000
    """how many pictures to measure"""
    overwrite: bool = False
    """replace a codec in `out`"""


@dataclass(frozen=True)
class Encode:
    """Copies a data set, giving every sample with a picture its latents."""

    data: Path
    """a folder of shards"""
    latents: str
    """folder of the autoencoder"""
    out: Path
    """folder to write"""
    batch_size: int = 64
    """pictures encoded at once"""
    overwrite: bool = False
    """replace a data set in `out`"""


COMMANDS = {
    "train-text": TrainText,
    "train-latents": TrainLatents,
    "fit-statistics": FitStatistics,
    "fit-pixels": FitPixels,
    "encode": Encode,
}


def main(argv: list[str]) -> int:
    """Runs one of the commands; returns the exit code."""
    name, rest = (argv[0], argv[1:]) if argv else ("", [])
    if name in ("", "-h", "--help"):
        print(f"usage: {PROG} COMMAND ...\n\ncommands:")
        print("\n".join(f"  {command:<16}{cls.__doc__}" for command, cls in COMMANDS.items()))
        return 0 if name else 2
    if name not in COMMANDS:
        raise ValueError(f"'{name}' is no command of `{PROG}` (there are {', '.join(COMMANDS)})")
    arguments = parse(COMMANDS[name], rest, f"{PROG} {name}")
    command = shlex.join(["mmgen", "tokenizer", *argv])
    if isinstance(arguments, TrainText):
        run_train_text(arguments, command)
    elif isinstance(arguments, TrainLatents):
        run_train_latents(arguments, command)
    elif isinstance(arguments, FitStatistics):
        run_fit_statistics(arguments)
    elif isinstance(arguments, FitPixels):
        run_fit_pixels(arguments, command)
    else:
        run_encode(arguments)
    return 0


def run_train_text(arguments: TrainText, command: str) -> None:
    """Trains on every caption and text of the data sets, and prints bytes per token."""
    texts: list[str] = []
    for folder in arguments.data:
        found = list(_texts(folder, arguments.split))
        texts += found[:: -(-len(found) // arguments.max_texts)]
    tokenizer = train_text(
        texts,
        arguments.vocab_size,
        arguments.out,
        arguments.max_size,
        arguments.overwrite,
        {"command": command},
    )
    num_tokens = sum(len(tokenizer.encode(text)) for text in texts)
    num_bytes = sum(len(text.encode()) for text in texts)
    print(f"{arguments.out}: {tokenizer.vocab_size} ids, {num_bytes / num_tokens:.2f} bytes per token")


def run_train_latents(arguments: TrainLatents, command: str) -> None:
    """Trains, showing progress on a terminal, and prints the PSNR on the held-out split."""
    pictures = stack_pictures(_pictures(arguments.data, arguments.split), arguments.size)
    held_out = stack_pictures(_pictures(arguments.data, arguments.held_out), arguments.size)
    with _progress() as progress:
        task = progress.add_task("steps", total=arguments.recipe.num_steps)

        def show(step: int, losses: dict[str, float]) -> None:
            progress.update(task, completed=step, description=f"loss {losses['loss']:.4f}")

        each, of_mean = train_latents(
            arguments.recipe,
            pictures,
            held_out,
            arguments.out,
            arguments.work,
            arguments.save_every,
            arguments.overwrite,
            {"command": command},
            show,
        )
    print(
        f"{arguments.out}: {each:.2f} dB on {len(held_out)} pictures of {arguments.held_out}; "
        f"{of_mean:.2f} dB of their mean error"
    )


def run_fit_statistics(arguments: FitStatistics) -> None:
    """Measures the first pictures of the split, one by one: they may differ in size."""
    fit_statistics(arguments.latents, _first_pictures(arguments))


def run_fit_pixels(arguments: FitPixels, command: str) -> None:
    """Measures the first pictures of the split."""
    pictures = _first_pictures(arguments)
    fit_pixels(arguments.out, pictures, arguments.grey, arguments.overwrite, {"command": command})


def _first_pictures(arguments: FitStatistics | FitPixels) -> Iterator[torch.Tensor]:
    pictures = islice(_pictures(arguments.data, arguments.split), arguments.num_pictures)
    return (picture_to_tensor(picture)[None] for picture in pictures)


def run_encode(arguments: Encode) -> None:
    """Copies the data set split by split, in order; what made the latents stands in the manifest's sources."""
    codec = load_latent_codec(arguments.latents)
    old = _manifest(arguments.data)
    attribution = arguments.data / "ATTRIBUTION.md"
    split_of: dict[str, str] = {}  # key -> split

    def samples() -> Iterator[Sample]:
        rejects = Rejects()
        with _progress() as progress:
            task = progress.add_task("samples", total=old.num_samples() or None)
            for split in old.splits:
                source = read_shards(find_shards(arguments.data, split), rejects)
                while batch := list(islice(source, arguments.batch_size)):
                    split_of.update((sample.key, split) for sample in batch)
                    yield from encode_batch(codec, batch)
                    progress.advance(task, len(batch))
        for reason, count in rejects.samples.items():
            print(f"left out {count} samples: {reason}", file=sys.stderr)

    new = write_shards(
        arguments.out,
        samples(),
        lambda sample: split_of.pop(sample.key),
        old.name,
        old.description,
        old.licences,
        {**old.sources, "latents": f"{Path(arguments.latents).name} {codec.fingerprint}"},
        attribution.read_text(encoding="utf-8") if attribution.is_file() else None,
        overwrite=arguments.overwrite,
    )
    print(
        f"{arguments.out}: {new.num_samples()} samples, latents of {codec.channels} channels, {new.num_bytes} bytes"
    )


@torch.no_grad()
def encode_batch(codec: LatentCodec, samples: Sequence[Sample]) -> list[Sample]:
    """The samples in their order, those with a picture with its latents as float16 [channels, height, width]."""
    by_size: dict[tuple[int, int], list[int]] = {}
    for index, sample in enumerate(samples):
        if sample.picture is not None:
            by_size.setdefault(sample.picture.size, []).append(index)
    encoded = list(samples)
    for indices in by_size.values():
        pixels = torch.stack([picture_to_tensor(picture) for i in indices if (picture := samples[i].picture)])
        try:
            latents = codec.encode(pixels).to(torch.float16).numpy()
        except ValueError as error:
            raise ValueError(f"{samples[indices[0]].shard}: {samples[indices[0]].key}: {error}") from None
        if not np.isfinite(latents).all():
            raise ValueError(
                f"{samples[indices[0]].shard}: latents that float16 does not hold; fit the statistics anew"
            )
        for index, array in zip(indices, latents, strict=True):
            encoded[index] = replace(samples[index], latents=array)
    return encoded


def _texts(folder: str, split: str) -> Iterator[str]:
    for sample in read_shards(find_shards(folder, split), Rejects()):
        yield from sample.captions.values()
        yield from (part for part in sample.parts if isinstance(part, str))


def _pictures(folder: str, split: str) -> Iterator[Image.Image]:
    for sample in read_shards(find_shards(folder, split), Rejects()):
        if sample.picture is not None:
            yield sample.picture
        yield from (part for part in sample.parts if isinstance(part, Image.Image))


def _manifest(folder: Path) -> Manifest:
    """The data set's own, or one of a single split for a folder of tars without."""
    if (folder / MANIFEST).is_file():
        return read_manifest(folder)
    find_shards(folder)
    return Manifest(folder.name, {"train": ()}, ())


def _progress() -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)
