"""What a run looks at on its way, with the averaged weights: losses and pictures of held-out data, and previews.

Every rank takes part, since each holds a part of the weights; only the first writes.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

from mmgen.data.loader import build_loaders
from mmgen.evaluation.distances import kid_value
from mmgen.evaluation.features import Lite0Features, picture_features
from mmgen.evaluation.grid import picture_grid
from mmgen.evaluation.real import SEEN, read_split, real_pictures
from mmgen.model.attention import choose_backend
from mmgen.sampling.plan import batches
from mmgen.sampling.sampler import Sampler
from mmgen.sequence import NO_LABEL, PackedBatch
from mmgen.tokenization.text import TextTokenizer
from mmgen.training.feed import feeds
from mmgen.training.losses import compute_losses
from mmgen.training.metrics import Meters
from mmgen.training.ranks import Ranks
from mmgen.training.run import Parts, RunConfig
from mmgen.training.spikes import NUM_TIMES, tally

BATCH = 32  # pictures that are drawn between two looks at whether to stop


@torch.no_grad()
def validate(
    parts: Parts, config: RunConfig, ranks: Ranks, stop: Callable[[], bool] = lambda: False
) -> dict[str, float]:
    """Mean losses on the held-out sources, with draws that do not depend on the step: schedules are at their end.
    Those of no batch once `stop` says so, which is asked before each.

    The batches do not depend on the ranks, which compute them in turn; all compute equally many.
    """
    parts.model.eval()
    attention = choose_backend(
        config.train.attention, ranks.device, config.model.head_dim, config.train.precision
    )
    data = replace(config.data, sources=config.validation.sources, streams=1, weights="documents")
    meters = Meters()
    ready = feeds(
        build_loaders(data, parts.modalities, config.seed + 1, parts.objective.grouping),
        parts.objective,
        config.seed + 1,
        attention.backend,
        step=1,
        total_steps=1,
        joint=config.joint,
    )
    rounds = -(-config.validation.batches // ranks.num_ranks)
    for number, (feed, _) in enumerate(islice(ready, rounds * ranks.num_ranks)):
        if number % ranks.num_ranks == 0 and stop():
            meters.read()
            return {}
        if number % ranks.num_ranks != ranks.rank:
            continue
        losses = compute_losses(parts, feed, config.train.precision, ranks.device)
        if number < config.validation.batches:
            for name, loss in losses.items():
                meters.add(f"validation_{name}_loss", loss.total, loss.count)
            bits = losses["text"].total / math.log(2)
            meters.add("validation_bits_per_byte", bits, text_bytes(feed.batch, parts.tokenizer))
            for cell, (total, count) in tally([feed], [losses]).items():
                if cell.time is not None:
                    meters.add(f"validation_{cell.modality}_loss_t{cell.time / NUM_TIMES:g}", total, count)
    return meters.read()


def text_bytes(batch: PackedBatch, tokenizer: TextTokenizer) -> int:
    """UTF-8 bytes of the text that a batch predicts. Tokens that end a text or begin a picture have none."""
    labels, document = batch.labels, batch.context.layout.document
    asked = labels != NO_LABEL
    texts = (
        tokenizer.decode(labels[row, asked[row] & (document[row] == number)].tolist())
        for row in range(len(labels))
        for number in document[row, asked[row]].unique().tolist()
    )
    return sum(len(text.encode()) for text in texts)


class Quality:
    """KID-lite0 of pictures drawn for held-out prompts, with few steps and with more.

    A figure to watch: `mmgen evaluate` measures with intervals. Raises ValueError where the sources have too few
    pictures or the features' package is missing: before training, not in the middle of it.
    """

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        wanted = config.validation.pictures
        real = [
            picture
            for source in config.validation.sources.values()
            for picture in real_pictures(read_split(source, _reported(source.split), wanted), config.size)
        ][:wanted]
        if len(real) < wanted:
            raise ValueError(
                f"validation.pictures {wanted}: the sources of validation have {len(real)} with a caption"
            )
        self.prompts = [picture.prompt for picture in real]
        self._extract = Lite0Features(ranks.device)
        self._real = picture_features([picture.picture for picture in real], self._extract)

    @torch.no_grad()
    def measure(self, parts: Parts, stop: Callable[[], bool] = lambda: False) -> dict[str, float]:
        """`validation_kid_<N>_steps` for each number of steps; only those that `stop` leaves time for, which is asked
        before each batch of pictures."""
        sampler, found = _sampler(parts, self.config), {}
        for steps in self.config.validation.steps:
            images, plan = [], replace(self.config.plan, steps=steps)
            for prompts in batches(self.prompts, BATCH):
                if stop():
                    return found
                with _drawing(self.config, self.ranks):
                    images += sampler.generate(prompts, plan, seed=len(images)).images
            value = kid_value(picture_features(images, self._extract), self._real)
            found[f"validation_kid_{steps}_step{'s' if steps > 1 else ''}"] = value
        return found


def _reported(split: str) -> str:
    return SEEN if split == "train" else split


def _sampler(parts: Parts, config: RunConfig) -> Sampler:
    return Sampler(parts.model, parts.modalities, parts.objective, config.size, config.plan)


@contextmanager
def _drawing(config: RunConfig, ranks: Ranks) -> Iterator[None]:
    """How a model that is being trained draws."""
    # where matrices travel in bfloat16 there are no others to draw with
    narrow = config.train.precision == "bf16" and ranks.num_ranks > 1
    with (
        torch.autocast(ranks.device.type, torch.bfloat16, enabled=narrow),
        torch.compiler.set_stance("force_eager"),  # a cache grows: every shape would be compiled anew
    ):
        yield


def preview(
    parts: Parts, config: RunConfig, ranks: Ranks, step: int, stop: Callable[[], bool] = lambda: False
) -> Path | None:
    """Draws the preview prompts with each number of steps: one grid under the run's `previews`. None, and no grid,
    where `stop` says so, which is asked before each number of steps.
    """
    sampler, rows = _sampler(parts, config), []
    with _drawing(config, ranks):
        for steps in config.preview.steps:
            if stop():
                return None
            plan = replace(config.plan, steps=steps, guidance=config.preview.guidance)
            rows.append(sampler.generate(config.preview.prompts, plan).images)
    path = Path(config.run) / "previews" / f"step-{step:08d}.png"
    if ranks.rank == 0:
        path.parent.mkdir(exist_ok=True)
        labels = [f"{steps} step{'s' if steps > 1 else ''}" for steps in config.preview.steps]
        picture_grid(rows, labels, config.preview.prompts).save(path)
    return path
