"""The protocol of `mmgen evaluate`: what a trained model draws and says, measured on prompts that it has and
has not seen.

Every split gives one row for the real pictures (floors and ceilings: what a perfect model would score), one for the
pictures passed through the codec (what a perfect trunk could reach) and one per number of steps. Loads no run, prints
nothing and writes nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from mmgen.data.source import SourceConfig
from mmgen.evaluation.alignment import (
    LinearAlignment,
    named_concepts,
    nearest_concepts,
    retrieves_concept,
    retrieves_own,
    train_alignment,
)
from mmgen.evaluation.distances import frechet, frechet_distance, kid, kid_value, real_floor
from mmgen.evaluation.features import Lite0Features, SentenceFeatures, picture_features
from mmgen.evaluation.intervals import Estimate, proportion
from mmgen.evaluation.memorization import MIN_HELD_OUT, memorization
from mmgen.evaluation.real import SEEN, RealPicture, read_split, real_pictures, splits_of
from mmgen.evaluation.text import bits_per_byte
from mmgen.sampling.sampler import Sampler
from mmgen.sequence import Sample
from mmgen.tokenization.latents import picture_to_tensor, tensor_to_picture

MEMORY_PIXELS = 32  # side at which pictures are compared pixel by pixel: finds copies, and fits in memory
BATCH = 64
SEED_STRIDE = 1_000_003  # request i draws from seed + i: far apart, so that two seeds share no noise

Progress = Callable[[str, int, int], None]
"""(what is done, how many are, of how many)"""


@dataclass(frozen=True)
class EvaluateConfig:
    """What is drawn: `num` prompts of each of `splits` (none: of all that the data has), at every number of steps."""

    steps: tuple[int, ...] = (1, 2, 4, 8)
    guidance: float = 2.0
    num: int = 200
    seed: int = 0
    splits: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.steps or min(self.steps) < 1:
            raise ValueError(f"steps {list(self.steps)} must be one or more numbers of at least 1")
        if self.num < 4:
            raise ValueError(
                f"num {self.num} must be at least 4: a distance needs two halves of two pictures"
            )


@dataclass(frozen=True)
class Row:
    """Figures of one split for one source of pictures: "real" (a distance's floor, a retrieval's ceiling), "codec"
    (the real ones encoded and decoded) or "model" (with its steps, network evaluations, FLOPs and seconds).

    kid_lite0, fd_lite0: distances to the real pictures of the same prompts. own_latent, own_lite0: the nearest real
    picture among the prompts' is the prompt's own. concept_lite0: the nearest real picture of any other style shows
    the prompt's concept. concept_text: of all the split's concept names the prompt's fits best. copies_lite0,
    copies_pixels: nearer to a training picture than all but 5 % of held-out pictures are."""

    split: str
    source: str
    num: int
    figures: Mapping[str, Estimate]
    steps: int | None = None
    nfe: int | None = None
    flops: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class TextRow:
    """Figures of one split and data source for what the model says. caption_exact: the caption written for a
    real picture names its concept; caption_minilm: of all concept names its own is nearest in meaning (ceiling:
    for the true captions). bits_per_byte: of the plain captions or texts."""

    split: str
    source: str
    num: int
    figures: Mapping[str, Estimate]


@dataclass(frozen=True)
class Evaluation:
    config: EvaluateConfig
    rows: Sequence[Row]
    text_rows: Sequence[TextRow]

    def to_json(self) -> dict[str, Any]:
        """Plain mappings and lists."""
        return asdict(self)


def evaluate(
    sampler: Sampler,
    sources: Mapping[str, SourceConfig],
    config: EvaluateConfig,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure `sampler` on the data of `sources`. Raises ValueError for a split that no source has, and where
    the packages with the frozen networks are missing."""
    there = splits_of(sources)
    for split in config.splits:
        if split not in there:
            raise ValueError(f"the data has no split {split!r}, only {', '.join(there)}")
    splits = config.splits or tuple(there)
    samples = {split: {name: read_split(s, split) for name, s in sources.items()} for split in there}
    text_rows = [
        row
        for split in splits
        for name, members in samples[split].items()
        if (row := _bits_row(sampler, split, name, members[: config.num], config.seed)) is not None
    ]
    if "image" not in sampler.modalities:
        return Evaluation(config, [], text_rows)
    pictures = {
        split: real_pictures([sample for members in by_source.values() for sample in members], sampler.size)
        for split, by_source in samples.items()
    }
    judge = Judge(pictures, progress or (lambda *_: None))
    rows: list[Row] = []
    for split in splits:
        chosen = pictures[split][: config.num]
        if len(chosen) < 4:
            continue
        rows += judge.picture_rows(sampler, split, chosen, config)
        text_rows.append(judge.caption_row(sampler, split, chosen, config))
    if not rows:
        raise ValueError(
            f"no split of the data has 4 captioned pictures, the fewest that can be judged: {list(splits)}"
        )
    return Evaluation(config, rows, text_rows)


class Judge:
    """The frozen networks, and what they say of the real pictures of each split."""

    def __init__(self, pictures: Mapping[str, Sequence[RealPicture]], progress: Progress) -> None:
        self.lite0 = Lite0Features()
        self.minilm = SentenceFeatures()
        self.progress = progress
        self.pictures = pictures
        self.features = {
            split: self._features(
                [real.picture for real in members], f"features of real pictures ({split})", True
            )
            for split, members in pictures.items()
        }
        self.pixels = {
            split: small_pixels([real.picture for real in members]) for split, members in pictures.items()
        }
        self._alignments: dict[str, LinearAlignment] = {}

    def picture_rows(
        self, sampler: Sampler, split: str, chosen: Sequence[RealPicture], config: EvaluateConfig
    ) -> list[Row]:
        """Real, codec, and one row per number of steps, for `chosen`: the first pictures of `split`."""
        real = self.features[split][: len(chosen)]
        key = (split, config.seed)
        floors = {
            "kid_lite0": real_floor(kid_value, real, key),
            "fd_lite0": real_floor(frechet_distance, real, key),
            **self._concepts(split, chosen, real),
        }
        rows = [Row(split, "real", len(chosen), floors)]
        latents = encode([picture.picture for picture in chosen], sampler)
        decoded = decode(latents, sampler)
        rows.append(
            Row(
                split,
                "codec",
                len(chosen),
                self._figures(split, chosen, decoded, encode(decoded, sampler), latents, key),
            )
        )
        for steps in config.steps:
            what = f"drawing {split}, {steps} step{'s' if steps > 1 else ''}"
            result = sampler.generate(
                [picture.prompt for picture in chosen],
                replace(sampler.plan, steps=steps, guidance=config.guidance),
                seed=config.seed * SEED_STRIDE,
                on_batch=lambda done, what=what: self.progress(what, done, len(chosen)),
            )
            assert result.latents is not None
            figures = self._figures(split, chosen, result.images, result.latents, latents, key)
            cost = result.cost
            rows.append(Row(split, "model", len(chosen), figures, steps, cost.nfe, cost.flops, cost.seconds))
        return rows

    def caption_row(
        self, sampler: Sampler, split: str, chosen: Sequence[RealPicture], config: EvaluateConfig
    ) -> TextRow:
        """What the model says of `chosen`, against the names of all concepts of training and of `split`."""
        self.progress(f"describing {split}", 0, len(chosen))
        plan = replace(sampler.plan, temperature=0)
        captions = sampler.describe(
            [real.picture for real in chosen], plan, seed=config.seed * SEED_STRIDE
        ).text
        names = {real.name: real.concept for real in (*self.pictures[SEEN], *self.pictures[split])}
        concepts = [real.concept for real in chosen]

        def right(found: Sequence[str | None]) -> Estimate:
            return proportion([one == other for one, other in zip(found, concepts, strict=True)])

        figures = {
            "caption_exact": right(named_concepts(captions, names)),
            "caption_minilm": right(nearest_concepts(captions, names, self.minilm)),
            "caption_minilm_ceiling": right(
                nearest_concepts([real.prompt for real in chosen], names, self.minilm)
            ),
        }
        return TextRow(split, "captions", len(chosen), figures)

    def _features(
        self, pictures: Sequence[Image.Image], what: str, cached: bool = False
    ) -> Float[Tensor, "N F"]:
        return picture_features(
            pictures, self.lite0, cached, lambda done: self.progress(what, done, len(pictures))
        )

    def _figures(
        self,
        split: str,
        chosen: Sequence[RealPicture],
        drawn: Sequence[Image.Image],
        drawn_latents: Float[Tensor, "N C h w"],
        real_latents: Float[Tensor, "N C h w"],
        key: tuple[int | str, ...],
    ) -> dict[str, Estimate]:
        real = self.features[split][: len(chosen)]
        features = self._features(drawn, f"features of drawn pictures ({split})")
        figures = {
            "kid_lite0": kid(features, real, key, paired=True),
            "fd_lite0": frechet(features, real, key),
            "own_latent": proportion(retrieves_own(drawn_latents, real_latents)),
            "own_lite0": proportion(retrieves_own(features, real, cosine=True)),
            **self._concepts(split, chosen, features),
        }
        # New pictures of a split are as near to training as its real ones are; for training prompts there are none.
        held_out = [name for name in self.pictures if name != SEEN] if split == SEEN else [split]
        if sum(len(self.pictures[name]) for name in held_out) >= MIN_HELD_OUT:
            reference = torch.cat([self.features[name] for name in held_out])
            figures["copies_lite0"] = memorization(features, self.features[SEEN], reference).share
            reference = torch.cat([self.pixels[name] for name in held_out])
            figures["copies_pixels"] = memorization(small_pixels(drawn), self.pixels[SEEN], reference).share
        return figures

    def _concepts(
        self, split: str, chosen: Sequence[RealPicture], features: Float[Tensor, "N F"]
    ) -> dict[str, Estimate]:
        """Whether pictures drawn for the prompts of `chosen` show the right concept, by real pictures and by
        names."""
        names = [SEEN] if split == SEEN else [SEEN, split]
        gallery = [real for name in names for real in self.pictures[name]]
        by_picture = retrieves_concept(
            features,
            [real.concept for real in chosen],
            [real.style for real in chosen],
            torch.cat([self.features[name] for name in names]),
            [real.concept for real in gallery],
            [real.style for real in gallery],
        )
        name_of = {real.concept: real.name for real in chosen}
        concepts, texts = list(name_of), self.minilm(list(name_of.values()))
        by_text = []
        for row, real in enumerate(chosen):
            best = self._alignment(real.style).similarity(features[row : row + 1], texts).argmax()
            by_text.append(concepts[int(best)] == real.concept)
        return {"concept_lite0": proportion(by_picture), "concept_text": proportion(by_text)}

    def _alignment(self, style: str) -> LinearAlignment:
        """Trained on the training pictures of every other style: it never saw the real picture of a prompt it
        judges."""
        if style not in self._alignments:
            self.progress(f"training the text alignment without {style}", 0, 1)
            rows = [row for row, real in enumerate(self.pictures[SEEN]) if real.style != style]
            others = [self.pictures[SEEN][row] for row in rows]
            texts = self.minilm([real.name for real in others])
            labels = [real.concept for real in others]
            self._alignments[style] = train_alignment(self.features[SEEN][rows], texts, labels, (style,))
        return self._alignments[style]


def encode(pictures: Sequence[Image.Image], sampler: Sampler) -> Float[Tensor, "N C h w"]:
    """Normalised latents of pictures of one size."""
    with torch.inference_mode():
        parts = [
            sampler.codec.encode(
                torch.stack([picture_to_tensor(picture) for picture in pictures[i : i + BATCH]])
            )
            for i in range(0, len(pictures), BATCH)
        ]
    return torch.cat(parts)


def decode(latents: Float[Tensor, "N C h w"], sampler: Sampler) -> list[Image.Image]:
    """Pictures of normalised latents."""
    return [tensor_to_picture(x) for part in latents.split(BATCH) for x in sampler.codec.decode(part)]


def small_pixels(pictures: Sequence[Image.Image]) -> Float[Tensor, "N F"]:
    """Pictures as rows of pixels in [-1, 1] at 32 x 32."""
    side = (MEMORY_PIXELS, MEMORY_PIXELS)
    rows = [picture_to_tensor(picture.resize(side, Image.Resampling.BOX)).flatten() for picture in pictures]
    return torch.stack(rows) if rows else torch.empty(0, 3 * MEMORY_PIXELS**2)


def _bits_row(
    sampler: Sampler, split: str, name: str, samples: Sequence[Sample], seed: int
) -> TextRow | None:
    texts = [sample.captions["text"] for sample in samples if sample.captions.get("text")]
    if not texts:
        return None
    nats, num_bytes = (torch.as_tensor(part) for part in sampler.bits(texts))
    return TextRow(
        split, name, len(texts), {"bits_per_byte": bits_per_byte(nats, num_bytes, (split, name, seed))}
    )
