"""A training step on packed documents with per-run attention, against the same trunk on a plain padded batch.

Both hold the same documents of the demo. Plain: one document a row, padded to the longest, dense mask. Packed: as
training does it. The ratio of their times is that of forward and backward of all losses, timed in turns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import harness
from mmgen.config import load_yaml
from mmgen.data.compose import compose
from mmgen.data.pack import Packer
from mmgen.data.streams import SampleStream
from mmgen.modalities.layout import BatchWriter
from mmgen.model.attention import AttentionBackend
from mmgen.model.model import plan_batch
from mmgen.objectives.draw import draw_state
from mmgen.rng import keyed_numpy
from mmgen.sequence import PAD, Document, PackedBatch
from mmgen.training.feed import Feed
from mmgen.training.losses import compute_losses, weighted
from mmgen.training.run import Parts, RunConfig, build


@dataclass(frozen=True)
class Arguments(harness.Arguments):
    config: Path = Path("configs/demo.yaml")
    """Whose documents and model are timed."""
    repeats: int = 15
    """Pairs of steps timed for each seed."""
    precision: str = "bf16"
    """bf16 or float32."""


def measure(arguments: Arguments) -> list[harness.Row]:
    config = load_yaml(arguments.config, RunConfig)
    parts = build(config)
    rows: list[harness.Row] = []
    for seed in range(arguments.seeds):
        documents, packed = _packed(config, parts, seed)
        plain = _padded(parts, documents)
        arms: list[tuple[PackedBatch, AttentionBackend]] = [
            (packed, "runs"),
            (plain, "dense"),
            (plain, "runs"),
        ]
        steps = [_step(parts, _feed(parts, *arm, seed), arguments.precision) for arm in arms]
        repeats = 3 if arguments.quick else arguments.repeats
        against_dense = harness.compare(steps[0], steps[1], repeats=repeats, seed=seed)
        runs_alone = harness.compare(steps[2], steps[1], repeats=repeats, seed=seed)
        rows.append(
            {
                "seed": seed,
                "documents": len(documents),
                "packed_seconds": against_dense.a,
                "padded_seconds": against_dense.b,
                "packed_over_padded": against_dense.ratio,
                "padded_runs_over_dense": runs_alone.ratio,
                "packed_filled": _filled(packed),
                "padded_filled": _filled(plain),
            }
        )
    return rows


def _packed(config: RunConfig, parts: Parts, seed: int) -> tuple[list[Document], PackedBatch]:
    """One batch of the demo, and the documents in it."""
    (name, source), *_ = config.data.sources.items()
    stream = SampleStream(name, source, seed)
    packer = Packer(config.data.pack, parts.modalities)
    misses = 0
    for number, sample in enumerate(stream.epoch()):
        draw = keyed_numpy(seed, "compose", number)
        misses += not packer.add(compose(sample, config.data.compose, parts.modalities, draw))
        if misses == config.data.pack.lookahead:
            break
    return [document for row in packer.rows for document in row], packer.finish()


def _padded(parts: Parts, documents: Sequence[Document]) -> PackedBatch:
    contexts, states = zip(*(document.lengths for document in documents), strict=True)
    writer = BatchWriter(len(documents), max(contexts), max(states), parts.modalities)
    for row, document in enumerate(documents):
        writer.write(row, document)
    return writer.finish()


def _feed(parts: Parts, batch: PackedBatch, backend: AttentionBackend, seed: int) -> Feed:
    return Feed(
        batch,
        draw_state(batch, parts.modalities, parts.objective, seed),
        plan_batch(batch, backend),
    )


def _step(parts: Parts, feed: Feed, precision: str):
    def step() -> None:
        weighted(parts, compute_losses(parts, feed, precision, torch.device("cpu"))).backward()
        parts.model.zero_grad(set_to_none=True)

    return step


def _filled(batch: PackedBatch) -> float:
    """Share of the token slots of both streams that hold a token."""
    documents = torch.cat([batch.context.layout.document.flatten(), batch.state.layout.document.flatten()])
    return round(float((documents != PAD).float().mean()), 3)


if __name__ == "__main__":
    harness.run("padded_batch", Arguments, measure, __doc__)
