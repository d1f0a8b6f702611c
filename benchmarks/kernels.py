"""Every attention backend that trains on this device against the dense mask: forward, backward, and making its plan.

Packs are the demo's own batches, and one long document of texts and pictures in turns, at growing lengths and with
several noisy copies of each picture. What is timed is the attention of both streams of one layer, in turns with dense.
A plan is made once a batch, whatever the number of layers; it is timed for kernels that do not run here too. `power` is
p of seconds ~ length^p, fitted over the lengths.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from benchmarks import harness
from mmgen.config import load_yaml
from mmgen.data.loader import build_loaders
from mmgen.modalities.base import text_positions
from mmgen.modalities.layout import BatchWriter
from mmgen.model.attention import AttentionBackend, choose_backend
from mmgen.model.attention.rule import count_pairs
from mmgen.model.model import plan_batch
from mmgen.rng import keyed_numpy
from mmgen.sequence import Document, Layout, PackedBatch, Span, move
from mmgen.training.run import Parts, RunConfig, build

DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}
PICTURE = 64  # tokens of a picture in the long document, and of the text before it
PLANNED_ANYWHERE: tuple[AttentionBackend, ...] = (
    "flex",
    "varlen",
)  # of the segments' kernels, one stands for all
Attends = Callable[[], object]


@dataclass(frozen=True)
class Arguments(harness.Arguments):
    config: Path = Path("configs/demo.yaml")
    """Whose batches are the first pack."""
    lengths: tuple[int, ...] = (512, 1024, 2048)
    """Context tokens of the long document."""
    particles: tuple[int, ...] = (1, 4)
    """Noisy copies of each of its pictures."""
    heads: int = 4
    """Of queries."""
    kv_heads: int = 4
    """Of keys and values."""
    head_dim: int = 64
    """Of each."""
    precision: Literal["bf16", "float32"] = "bf16"
    """Of queries, keys and values."""
    repeats: int = 7
    """Pairs of calls timed for each figure."""


def measure(arguments: Arguments) -> Iterator[harness.Row]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = load_yaml(arguments.config, RunConfig)
    parts = build(config)
    lengths = arguments.lengths[:2] if arguments.quick else arguments.lengths
    backends = _able(arguments, device)
    rows: list[harness.Row] = []
    for seed in range(arguments.seeds):
        packs = {("demo", 1): _demo(config, parts, seed)}
        for particles in arguments.particles:
            for length in lengths:
                packs[f"document of {length}", particles] = _long(parts, length, particles, seed)
        for (name, particles), batch in packs.items():
            what = {"seed": seed, "pack": name, "particles": particles, **_shape(batch)}
            for backend in backends:
                rows.append({**what, **_times(batch, backend, arguments, device, seed)})
                yield rows[-1]
            for backend in PLANNED_ANYWHERE:
                if backend not in backends:
                    seconds = _plan_seconds(batch, backend, arguments, device)
                    rows.append({**what, "backend": backend, "plan_seconds": seconds})
                    yield rows[-1]
    yield from _powers(rows, lengths)


def _able(arguments: Arguments, device: torch.device) -> list[AttentionBackend]:
    """All but dense that can train here."""
    able: list[AttentionBackend] = []
    for backend in get_args(AttentionBackend):
        try:
            choose_backend(backend, device, arguments.head_dim, arguments.precision)
        except ValueError:
            continue
        able.append(backend)
    return [backend for backend in able if backend != "dense"]


def _demo(config: RunConfig, parts: Parts, seed: int) -> PackedBatch:
    loader = build_loaders(config.data, parts.modalities, seed, parts.objective.grouping)[0]
    return next(iter(loader))[0]


def _long(parts: Parts, length: int, particles: int, seed: int) -> PackedBatch:
    """One document of so many context tokens: texts of about PICTURE tokens, each before a picture, all read later."""
    image = parts.modalities["image"]
    draw = keyed_numpy("kernels", seed, length)
    spans: list[Span] = []
    left = length
    while left > 2 * PICTURE:
        text = min(int(draw.integers(PICTURE // 2, 3 * PICTURE // 2)), left - PICTURE)
        values = torch.zeros(PICTURE, image.channels)
        place = np.zeros((PICTURE, 3), dtype=np.int64)
        spans.append(_text(text))
        spans.append(Span("image", place, None, values, values, (PICTURE,), copies=particles, predicted=True))
        left -= text + PICTURE
    spans.append(_text(left))
    context, state = (sum(lengths) for lengths in zip(*(span.lengths for span in spans), strict=True))
    writer = BatchWriter(1, context, -(-state // 128) * 128, parts.modalities)
    writer.write(0, Document(tuple(spans)))
    return writer.finish()


def _text(length: int) -> Span:
    # nothing is predicted: of labels attention knows nothing
    return Span("text", text_positions(0, length), np.zeros(length, dtype=np.int64), predicted=False)


def _shape(batch: PackedBatch) -> dict[str, float]:
    """Tokens of the streams, and the share of the dense rectangles that the rule allows."""
    context, state = batch.context.layout, batch.state.layout
    both = Layout.concat([context, state])
    rows, length = context.shape
    dense = rows * (length**2 + state.shape[1] * both.shape[1])
    allowed = count_pairs(context, context) + count_pairs(state, both)
    return {"context": length, "state": state.shape[1], "allowed": round(allowed / dense, 4)}


def _times(
    batch: PackedBatch, backend: AttentionBackend, arguments: Arguments, device: torch.device, seed: int
) -> dict[str, object]:
    repeats = _repeats(arguments)
    ours, dense = (_attends(batch, each, arguments, device) for each in (backend, "dense"))
    forward, both = (
        harness.compare(a, b, repeats=repeats, seed=seed) for a, b in zip(ours, dense, strict=True)
    )
    return {
        "backend": backend,
        "forward_seconds": forward.a,
        "forward_over_dense": forward.ratio,
        "with_backward_seconds": both.a,
        "with_backward_over_dense": both.ratio,
        "plan_seconds": _plan_seconds(batch, backend, arguments, device),
        "dense_forward_seconds": forward.b,
        "dense_with_backward_seconds": both.b,
        "dense_plan_seconds": _plan_seconds(batch, "dense", arguments, device),
    }


def _repeats(arguments: Arguments) -> int:
    return 3 if arguments.quick else arguments.repeats


def _plan_seconds(
    batch: PackedBatch, backend: AttentionBackend, arguments: Arguments, device: torch.device
) -> float:
    """Median seconds to plan both streams."""
    calls = (harness.seconds(lambda: _planned(batch, backend, device)) for _ in range(_repeats(arguments)))
    return statistics.median(calls)


def _planned(batch: PackedBatch, backend: AttentionBackend, device: torch.device):
    """As a step gets it: dense is planned where it computes, the others are planned beside it and moved."""
    if backend == "dense":
        return plan_batch(move(batch, device), backend)
    return move(plan_batch(batch, backend), device)


def _attends(
    batch: PackedBatch, backend: AttentionBackend, arguments: Arguments, device: torch.device
) -> tuple[Attends, Attends]:
    """The attention of both streams: forward alone, and with its backward pass."""
    plan = _planned(batch, backend, device)
    context, state = batch.context.layout, batch.state.layout
    draw = torch.Generator(device).manual_seed(0)

    def make(layout: Sequence[int], heads: int) -> Tensor:
        shape = (*layout, heads, arguments.head_dim)
        made = torch.randn(shape, generator=draw, device=device).to(DTYPES[arguments.precision])
        return made.requires_grad_()

    both = (context.shape[0], context.shape[1] + state.shape[1])
    calls = [
        (
            attend,
            make(queries, arguments.heads),
            make(keys, arguments.kv_heads),
            make(keys, arguments.kv_heads),
        )
        for attend, queries, keys in (
            (plan.context, context.shape, context.shape),
            (plan.state, state.shape, both),
        )
    ]

    @torch.no_grad()
    def forward() -> None:
        for attend, q, k, v in calls:
            attend(q, k, v)

    def with_backward() -> None:
        for attend, q, k, v in calls:
            out = attend(q, k, v)
            torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    return forward, with_backward


def _powers(rows: Sequence[harness.Row], lengths: Sequence[int]) -> list[harness.Row]:
    """How each time grows with the length of the document: the slope in logarithms, over seeds."""
    found: list[harness.Row] = []
    names = ("forward_seconds", "with_backward_seconds", "plan_seconds")
    long = [row for row in rows if row["pack"] != "demo"]
    for backend, particles in dict.fromkeys((row["backend"], row["particles"]) for row in long):
        own = [row for row in long if (row["backend"], row["particles"]) == (backend, particles)]
        for who, prefix in ((backend, ""), ("dense", "dense_")):
            row: dict[str, object] = {"pack": "growth", "particles": particles, "backend": who}
            for name in (name for name in names if prefix + name in own[0]):
                slopes = []
                for seed in dict.fromkeys(each["seed"] for each in own):
                    times = [each[prefix + name] for each in own if each["seed"] == seed]
                    slopes.append(float(harness.power(lengths, times)))
                row[name.replace("seconds", "power")] = harness.over_seeds(slopes)
            if len(row) > 3:
                found.append(row)
    return found


if __name__ == "__main__":
    harness.run("kernels", Arguments, measure, __doc__)
