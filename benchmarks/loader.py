"""How fast samples become documents, beside bare WebDataset doing the same decoding, resizing and tokenization.

Theirs: `WebDataset(...).shuffle(1000)` and a map to token ids and a tensor, which neither resumes nor makes documents.
Ours, in an order that resumes bit for bit, beside it: `reading` does the same with what `SampleStream` gives,
`documents` composes documents of it (captions drawn, patches, positions, spans), `loader` makes batches of those. Each
`*_speed` is how many times as many samples a second ours gives. All run in one process, in turns with theirs, and keep
nothing in memory between passes.
"""

import io
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice, takewhile
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image as Pictures
from webdataset.compat import WebDataset

from benchmarks import harness
from mmgen.config import load_yaml
from mmgen.data.compose import ComposeConfig, compose
from mmgen.data.find import ShardFile, find_shards
from mmgen.data.listing import index_path, scan_tar
from mmgen.data.loader import DataConfig, Loader
from mmgen.data.pack import PackConfig
from mmgen.data.read import find_listing, read_entries, read_shards
from mmgen.data.rejects import Rejects
from mmgen.data.remote import RemoteConfig
from mmgen.data.shards import write_shards
from mmgen.data.source import SourceConfig
from mmgen.data.streams import Position, SampleStream
from mmgen.modalities import Modality, build_modalities
from mmgen.modalities.buckets import BucketConfig, choose_bucket, fit
from mmgen.rng import keyed_numpy
from mmgen.sequence import Sample
from mmgen.tokenization.latents import picture_to_tensor
from mmgen.tokenization.text import TextTokenizer, load_text_tokenizer
from mmgen.training.run import RunConfig

CONFIG = Path("configs/emoji.yaml")
EMOJI = Path("data_pipelines/assets/emoji64")
BUCKETS = BucketConfig(((64, 64), (48, 64), (64, 48)))
LATENTS = (8, 8, 8)  # channels, height, width


@dataclass(frozen=True)
class Arguments(harness.Arguments):
    samples: int = 1000
    """Samples of a pass."""
    repeats: int = 7
    """Pairs of passes for each seed."""
    skip: int = 30_000
    """Samples of the tar in which a resume is timed."""


def measure(arguments: Arguments) -> list[harness.Row]:
    if arguments.quick:
        arguments = replace(arguments, samples=200, repeats=3, skip=2000)
    tokenizer = load_text_tokenizer(load_yaml(CONFIG, RunConfig).tokenizer)
    with TemporaryDirectory() as folder:
        samples = list(islice(read_shards(find_shards(EMOJI, "train"), Rejects()), arguments.samples))
        write(Path(folder) / "latents", map(with_latents, samples), 500)
        write(Path(folder) / "pictures", map(resized, samples), 500)
        rows: list[harness.Row] = []
        for data in ("latents", "pictures"):
            for seed in range(arguments.seeds):
                rows.append(compare(data, Path(folder) / data, tokenizer, seed, arguments))
        return [*rows, *skips(Path(folder) / "large", samples, arguments)]


def compare(
    data: str, folder: Path, tokenizer: TextTokenizer, seed: int, arguments: Arguments
) -> harness.Row:
    image = {"codec": "pixels", "patch": 16, "buckets": {"sizes": list(BUCKETS.sizes)}, "cache_mb": 0}
    if data == "latents":
        image = {"codec": "tokenizers/emoji-latents", "patch": 2, "cache_mb": 0}
    modalities = build_modalities({"text": {"captions": {"text": 1.0}}, "image": image}, tokenizer)
    num = arguments.samples
    theirs = webdataset(folder, tokenizer, num)
    ours = {
        "reading": (reading(folder, tokenizer, num), num),
        "documents": (documents(folder, modalities, num), num),
        "loader": batches(folder, modalities, num),
    }
    row: dict[str, Any] = {"data": data, "seed": seed}
    for name, (call, taken) in ours.items():
        found = harness.compare(theirs, call, repeats=arguments.repeats, seed=seed)
        row |= {
            f"{name}_speed": harness.scaled(found.ratio, taken / num),
            f"{name}_samples_per_second": taken / found.b,
            f"webdataset_samples_per_second_beside_{name}": num / found.a,
        }
    return row


def source(folder: Path) -> SourceConfig:
    return SourceConfig(str(folder), cache_mb=0)


def reading(folder: Path, tokenizer: TextTokenizer, num: int) -> Callable[[], None]:
    def run() -> None:
        for sample in islice(SampleStream("a", source(folder), 0).epoch(), num):
            tokenizer.encode(sample.captions["text"])
            if sample.latents is not None:
                torch.from_numpy(sample.latents.astype(np.float32))
            elif sample.picture is not None:
                size = choose_bucket(sample.picture.height, sample.picture.width, BUCKETS)
                assert size is not None
                picture_to_tensor(fit(sample.picture, size))

    return run


def documents(folder: Path, modalities: dict[str, Modality], num: int) -> Callable[[], None]:
    config = ComposeConfig({"text image": 1.0}, 0.0)

    def run() -> None:
        stream = SampleStream("a", source(folder), 0)
        for number, sample in enumerate(islice(stream.epoch(), num)):
            compose(sample, config, modalities, keyed_numpy(0, "compose", number))

    return run


def batches(folder: Path, modalities: dict[str, Modality], num: int) -> tuple[Callable[[], None], int]:
    """Makes as many batches as `num` samples give; and how many samples are in them.

    Theirs is to be timed over all `num`, some of which it would read ahead of fewer.
    """
    pack = PackConfig(max(num // 128, 1), 512, 512)
    data = DataConfig({"a": source(folder)}, ComposeConfig({"text image": 1.0}, 0.0), pack)
    loader = Loader(data, modalities, 0)
    made = [batch.num_documents for batch, _ in takewhile(lambda _: loader.num_drawn <= num, loader)]
    if not made:
        raise ValueError(f"samples {num} must be enough for a batch: 128 are")

    def run() -> None:
        for _ in islice(Loader(data, modalities, 0), len(made)):
            pass

    return run, sum(made)


def webdataset(folder: Path, tokenizer: TextTokenizer, num: int) -> Callable[[], None]:
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]

    def decode(group: dict[str, Any]) -> tuple[list[int], torch.Tensor]:
        json.loads(group["json"])
        ids = tokenizer.encode(group["txt"].decode())
        if "latents.npy" in group:
            latents = np.load(io.BytesIO(group["latents.npy"]), allow_pickle=False)
            return ids, torch.from_numpy(latents.astype(np.float32))
        with Pictures.open(io.BytesIO(group["jpg"])) as picture:
            picture = picture.convert("RGB")
        size = choose_bucket(picture.height, picture.width, BUCKETS)
        assert size is not None
        return ids, picture_to_tensor(fit(picture, size))

    def run() -> None:
        set_ = WebDataset(urls, shardshuffle=len(urls), empty_check=False)
        found: Any = set_.shuffle(1000, rng=random.Random(0)).map(decode)
        assert sum(1 for _ in islice(found, num)) == num

    return run


def with_latents(sample: Sample) -> Sample:
    """Captions and latents of the shape of the shipped autoencoder's; what is in them costs nothing."""
    values = keyed_numpy("latents", sample.key).standard_normal(LATENTS, dtype=np.float32)
    return replace(sample, picture=None, latents=values.astype(np.float16))


def resized(sample: Sample) -> Sample:
    """A JPEG of another size for each, as a photograph of a web set would be, but small."""
    assert sample.picture is not None
    height, width = keyed_numpy("size", sample.key).integers(96, 193, 2).tolist()
    return replace(sample, picture=sample.picture.resize((width, height), Pictures.Resampling.BICUBIC))


def write(folder: Path, samples: Iterator[Sample], per_shard: int) -> None:
    write_shards(
        folder, samples, lambda _: "train", "set", picture_format="jpg", max_samples_per_shard=per_shard
    )


def skips(folder: Path, samples: list[Sample], arguments: Arguments) -> list[harness.Row]:
    """Seconds until the first sample after a resume near the end of one large tar."""
    many = (replace(with_latents(samples[i % len(samples)]), key=f"{i:06d}") for i in range(arguments.skip))
    write(folder, many, arguments.skip)
    (path,) = folder.glob("*.tar")
    far = arguments.skip * 9 // 10

    def resume() -> None:
        stream = SampleStream("a", replace(source(folder), window=1), 0)
        stream.at(stream.find(Position(0, far, 0, far)))

    def read_in_order() -> None:
        next(read_entries(ShardFile(str(path)), RemoteConfig(), None, far))

    kept = find_listing(ShardFile(str(path)), RemoteConfig())
    stated = {
        "index beside the tar": resume,
        "headers read": lambda: scan_tar(path),
        "all read in order": read_in_order,
    }
    found = {how: median(harness.seconds(call) for _ in range(5)) for how, call in stated.items()}
    assert kept is not None and index_path(path).is_file()
    return [{"skip": f"{far} samples, {how}", "seconds": seconds} for how, seconds in found.items()]


if __name__ == "__main__":
    harness.run("loader", Arguments, measure, __doc__)
