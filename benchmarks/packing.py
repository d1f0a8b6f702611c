"""How much of a training batch is padding: the share of its FLOPs, over both streams, that is spent on no document.

The mix is half emoji of 64 x 64 pixels (16 tokens each), a quarter of 32 x 32 (4 tokens), and a quarter texts. A token
of the context costs what `expand` of it does, one of the state what `refine` does (`mmgen/sampling/cost.py`), with the
keys of a whole row, as dense attention computes them; a row costs the same whatever is in it.

What the packer leaves open at the ends of rows is small. What a row's two lengths leave open, where they are not in the
proportion in which the documents need them, is not: so one pair of lengths that fits the mix and one that does not.
Then `SHIPPED` configurations, with their own data and lengths.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image as Pictures

from benchmarks import harness
from mmgen.config import load_yaml
from mmgen.data.compose import ComposeConfig
from mmgen.data.find import find_shards
from mmgen.data.loader import DataConfig, Loader
from mmgen.data.pack import PackConfig
from mmgen.data.read import read_shards
from mmgen.data.rejects import Rejects
from mmgen.data.shards import write_shards
from mmgen.data.source import SourceConfig
from mmgen.modalities import build_modalities
from mmgen.model.trunk import TrunkConfig
from mmgen.sampling.cost import context_flops, state_flops
from mmgen.sequence import PAD, Grouping, PackedBatch, Sample
from mmgen.tokenization.text import load_text_tokenizer
from mmgen.training.run import RunConfig, build

CONFIG = Path("configs/emoji.yaml")
EMOJI = Path("data_pipelines/assets/emoji64")
LENGTHS = ((512, 256), (256, 256))  # of a row's context and state
SHIPPED = ("demo", "emoji")
KINDS = {"64x64": 0.5, "32x32": 0.25, "text": 0.25}


@dataclass(frozen=True)
class Arguments(harness.Arguments):
    batches: int = 20
    """Batches of each setting."""
    samples: int = 1500
    """Samples of each kind."""
    lookahead: tuple[int, ...] = (4, 16, 64)
    """Documents that may wait for room."""
    rows: int = 16
    """Rows of a batch."""


def measure(arguments: Arguments) -> list[harness.Row]:
    config = load_yaml(CONFIG, RunConfig)
    # pixels: what they are encoded to decides no length, and 8 x 8 of them are a token of the shipped autoencoder
    modalities = build_modalities(
        {"text": {"captions": {"text": 0.5, "tags": 0.5}}, "image": {"codec": "pixels", "patch": 16}},
        load_text_tokenizer(config.tokenizer),
    )
    num = 4 if arguments.quick else arguments.batches
    seeds = range(arguments.seeds)
    rows: list[harness.Row] = []
    with TemporaryDirectory() as folder:
        sources = write(Path(folder), 200 if arguments.quick else arguments.samples)
        for particles in (1, 4):
            for lengths in LENGTHS:
                for lookahead in arguments.lookahead:
                    pack = PackConfig(arguments.rows, *lengths, lookahead=lookahead)
                    data = DataConfig(sources, ComposeConfig({"interleaved": 1.0}, 0.0), pack)
                    made = (Loader(data, modalities, seed, Grouping(particles)) for seed in seeds)
                    rows.append(
                        _row("mix", data.pack, particles, [waste(config.model, each, num) for each in made])
                    )
    for name in SHIPPED:
        config = load_yaml(Path(f"configs/{name}.yaml"), RunConfig)
        parts = build(config)
        made = (Loader(config.data, parts.modalities, seed, parts.objective.grouping) for seed in seeds)
        particles = parts.objective.grouping.particles
        rows.append(
            _row(name, config.data.pack, particles, [waste(config.model, each, num) for each in made])
        )
    return rows


def _row(
    data: str, pack: PackConfig, particles: int, wastes: list[tuple[float, float, float]]
) -> harness.Row:
    sizes = {name: getattr(pack, name) for name in ("rows", "context_length", "state_length", "lookahead")}
    names = ("flops_wasted", "context_wasted", "state_wasted")
    shares = {
        name: harness.over_seeds(own) for name, own in zip(names, zip(*wastes, strict=True), strict=True)
    }
    return {"data": data, "particles": particles, **sizes, **shares}


def write(folder: Path, num: int) -> dict[str, SourceConfig]:
    """A source for each kind, out of the bundled emoji."""
    samples = list(islice(read_shards(find_shards(EMOJI, "train"), Rejects()), num))

    def made(kind: str) -> Iterator[Sample]:
        for sample in samples:
            if kind == "text":
                yield replace(sample, picture=None)
            elif kind == "32x32":
                assert sample.picture is not None
                yield replace(sample, picture=sample.picture.resize((32, 32), Pictures.Resampling.BICUBIC))
            else:
                yield sample

    for kind in KINDS:
        write_shards(folder / kind, made(kind), lambda _: "train", kind, picture_format="png")
    return {
        kind: SourceConfig(str(folder / kind), weight=weight, max_broken=1.0)
        for kind, weight in KINDS.items()
    }


def waste(trunk: TrunkConfig, loader: Loader, num: int) -> tuple[float, float, float]:
    """Shares of `num` batches that are padding: of FLOPs, of the tokens of the context, of those of the state."""
    filled = torch.zeros(2)
    for batch, _ in islice(loader, num):
        filled += torch.tensor([used(batch, "context"), used(batch, "state")])
    context, state = (1 - filled / num).tolist()
    pack = loader.config.pack
    keys, channels = pack.context_length + pack.state_length, loader.modalities["image"].channels
    clean = context_flops(trunk, pack.context_length, pack.context_length, channels)
    noisy = state_flops(trunk, 1, pack.state_length, keys, channels, channels)
    return (context * clean + state * noisy) / (clean + noisy), context, state


def used(batch: PackedBatch, stream: str) -> float:
    """Share of a stream's slots that hold a token."""
    document = getattr(batch, stream).layout.document
    return float((document != PAD).float().mean())


if __name__ == "__main__":
    harness.run("packing", Arguments, measure, __doc__)
