"""The picture codec: what encoding and decoding leaves of pictures that it was, and was not, trained on.

PSNR over white in dB, KID-lite0 and FD-lite0 between pictures and their reconstructions beside the real-against-real
floor, whether the nearest picture of a reconstruction is its own, and the scale of the latents (0 and 1 are meant).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks import harness
from mmgen.data.source import SourceConfig
from mmgen.evaluation import intervals
from mmgen.evaluation.alignment import retrieves_own
from mmgen.evaluation.distances import frechet, frechet_distance, kid, kid_value, real_floor
from mmgen.evaluation.features import Lite0Features, picture_features
from mmgen.evaluation.real import RealPicture, read_split, real_pictures, splits_of
from mmgen.rng import keyed_numpy
from mmgen.tokenization.latents import (
    LatentCodec,
    load_latent_codec,
    picture_to_tensor,
    psnr,
    reconstruct,
    tensor_to_picture,
    to_levels,
    to_unit,
)


@dataclass(frozen=True)
class Arguments(harness.Arguments):
    codec: str = "tokenizers/emoji-latents"
    """Folder of a diffusers autoencoder, or "pixels"."""
    data: str = "data_pipelines/assets/emoji64"
    """Folder of the data set."""
    size: int = 64
    """Side of the pictures in pixels."""
    num: int = 400
    """Pictures of each split; every seed draws others."""


def measure(arguments: Arguments) -> list[harness.Row]:
    codec, source = load_latent_codec(arguments.codec), SourceConfig(arguments.data)
    lite0, num = Lite0Features(), 40 if arguments.quick else arguments.num
    rows = []
    for split in splits_of({"": source}):
        pictures = real_pictures(read_split(source, split), (arguments.size, arguments.size))
        for seed in range(arguments.seeds):
            order = keyed_numpy("autoencoder", split, seed).permutation(len(pictures))[:num]
            rows += [
                {"split": split, "seed": seed, "num": len(order), **figure}
                for figure in _figures(codec, lite0, [pictures[i] for i in order], seed)
            ]
    return rows


def _figures(
    codec: LatentCodec, lite0: Lite0Features, pictures: Sequence[RealPicture], seed: int
) -> list[harness.Row]:
    levels = torch.stack([to_levels(picture_to_tensor(real.picture)) for real in pictures])
    seconds = harness.seconds(lambda: reconstruct(codec, levels))
    decoded = reconstruct(codec, levels)
    with torch.no_grad():
        latents = torch.cat([codec.encode(to_unit(part)) for part in levels.split(64)])
    each = torch.tensor([psnr(a[None], b[None])[0] for a, b in zip(levels, decoded, strict=True)])
    real = picture_features([picture.picture for picture in pictures], lite0)
    made = picture_features([tensor_to_picture(to_unit(picture)) for picture in decoded], lite0)
    key = ("autoencoder", seed)
    kid_floor, fd_floor = real_floor(kid_value, real, key), real_floor(frechet_distance, real, key)
    deviation = latents.std((0, 2, 3))
    return [
        {"figure": "PSNR, dB", "value": intervals.mean(each, key)},
        {"figure": "PSNR of the mean error, dB", "value": psnr(levels, decoded)[1]},
        {"figure": "KID-lite0", "value": kid(made, real, key, paired=True), "floor": kid_floor},
        {"figure": "FD-lite0", "value": frechet(made, real, key), "floor": fd_floor},
        {
            "figure": "nearest is its own (lite0)",
            "value": intervals.proportion(retrieves_own(made, real, True)),
        },
        {"figure": "largest mean of a channel", "value": latents.mean((0, 2, 3)).abs().max().item()},
        {"figure": "least deviation of a channel", "value": deviation.min().item()},
        {"figure": "largest deviation of a channel", "value": deviation.max().item()},
        {"figure": "ms a picture, there and back", "value": 1000 * seconds / len(pictures)},
    ]


if __name__ == "__main__":
    harness.run("autoencoder", Arguments, measure, __doc__)
