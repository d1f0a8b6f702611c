"""A training step over sizes and lengths: how fast, how much memory, and how its time grows.

Sizes: `mmgen bench train --synthetic`, each in a process of its own, so that `memory_gb` is its own; `mfu` where the
device's peak is known, on others `gflops_per_second` alone. Growth: whole steps on one document, of which one thing is
doubled: tokens of its context (`context`), pictures, each read by those after it (`pictures`), and noisy copies of its
picture, one group in one context (`particles`). All lengths are timed in turns. `power` is p of seconds ~ length^p,
by least squares of logarithms of the medians over rounds, with a bootstrap interval over rounds; `last_power` that of
the two longest alone; `flops_power` and `flops_last_power` are the same of counted operations.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from benchmarks import harness
from mmgen.evaluation.intervals import DRAWS, Estimate
from mmgen.model.trunk import TrunkConfig
from mmgen.objectives import FlowMatchingConfig, IMMConfig
from mmgen.rng import keyed_numpy
from mmgen.training.ranks import Ranks, default_device
from mmgen.training.run import RunConfig, TrainConfig, build
from mmgen.training.step import Stepper
from mmgen.training.synthetic import AROUND, picture_document, rows_feed

CONFIG = "configs/demo.yaml"
SIDE = 8  # tokens of a picture's height and width
CAPTION = 16  # tokens of each, where a document has several pictures
CONTEXT = 1024  # tokens, where particles share it

Axis = Literal["context", "pictures", "particles"]


@dataclass(frozen=True)
class Arguments(harness.Arguments):
    widths: tuple[int, ...] = (128, 256, 384)
    """Of trunks with heads of 64, a feed-forward of three times the width and `num_layers` blocks."""
    num_layers: int = 6
    lengths: tuple[int, ...] = (512, 2048)
    """Tokens of each stream of a batch's one row, full of captions with a picture of 16 tokens each."""
    context: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    """Tokens of a document."""
    pictures: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Of 64 tokens in a document."""
    particles: tuple[int, ...] = (2, 4, 8, 16, 32)
    """Of a picture of 64 tokens, after 1,024 of context."""
    steps: int = 10
    """Timed of each size and seed, after 2."""
    rounds: int = 7
    """Of all lengths of an axis, after one that is not timed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.widths) < 64 or any(width % 64 for width in self.widths):
            raise ValueError(f"widths {self.widths} must be multiples of 64, the size of a head")
        for axis in ("context", "pictures", "particles"):
            lengths = getattr(self, axis)
            if len(lengths) < 2 or list(lengths) != sorted(set(lengths)):
                raise ValueError(f"{axis} {lengths} must be two or more numbers that grow")
        if self.context[0] <= AROUND:
            raise ValueError(f"context {self.context} must be above {AROUND}: begin and the size are in it")
        if self.particles[0] < 2:
            raise ValueError(f"particles {self.particles} must be at least 2: a kernel compares them")


def measure(arguments: Arguments) -> list[harness.Row]:
    return _sizes(arguments) + _growth(arguments)


def _sizes(arguments: Arguments) -> list[harness.Row]:
    widths, lengths = arguments.widths, arguments.lengths
    if arguments.quick:
        widths, lengths = widths[:1], lengths[:1]
    found: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for seed in range(arguments.seeds):
        for width in widths:
            for length in lengths:
                record = _bench(width, length, seed, arguments)
                found.setdefault((width, length), []).append(record)
    rows: list[harness.Row] = []
    for (width, length), records in found.items():
        shown: dict[str, Callable[[Mapping[str, Any]], float]] = {
            "step_seconds": lambda record: record["step_seconds"],
            "tokens_per_second": lambda record: record["per_second"]["tokens"],
            "pictures_per_second": lambda record: record["per_second"]["pictures"],
            "gflops_per_second": lambda record: record["flops_per_second"] / 1e9,
            "memory_gb": lambda record: record["memory_gb"],
        }
        if records[0]["mfu"] is not None:
            shown["mfu"] = lambda record: record["mfu"]
        figures = {name: harness.over_seeds([of(record) for record in records]) for name, of in shown.items()}
        model = records[0]["what"].split(" ")[0]
        rows.append({"what": "size", "width": width, "parameters": model, "length": length, **figures})
    return rows


def _bench(width: int, length: int, seed: int, arguments: Arguments) -> Mapping[str, Any]:
    heads = str(width // 64)
    settings = {
        "seed": seed,
        "model.width": width,
        "model.num_layers": arguments.num_layers,
        "model.num_heads": heads,
        "model.num_kv_heads": heads,
        "model.head_dim": 64,
        "model.ffn_width": 3 * width,
        "data.pack.context_length": length,
        "data.pack.state_length": length,
    }
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    steps = 2 if arguments.quick else arguments.steps
    command = [sys.executable, "-m", "mmgen", "bench", "train", CONFIG, "--synthetic", "--json"]
    done = subprocess.run(
        [*command, "--steps", str(steps), "--warmup", "2", *flags],
        capture_output=True,
        text=True,
        check=False,
        cwd=harness.ROOT,
    )
    if done.returncode:
        raise ValueError(f"width {width}, length {length}: {done.stderr.strip()[-300:]}")
    return json.loads(done.stdout)


def _growth(arguments: Arguments) -> list[harness.Row]:
    axes: dict[Axis, tuple[int, ...]] = {
        "context": arguments.context,
        "pictures": arguments.pictures,
        "particles": arguments.particles,
    }
    rows: list[harness.Row] = []
    powers: list[harness.Row] = []
    for axis, lengths in axes.items():
        lengths = lengths[:2] if arguments.quick else lengths
        of_axis = []
        for seed in range(arguments.seeds):
            steps, flops = zip(*(_step(axis, length, seed) for length in lengths), strict=True)
            rounds = 2 if arguments.quick else arguments.rounds
            seconds = np.array([[harness.seconds(step) for step in steps] for _ in range(rounds + 1)])[1:]
            of_axis.append(grown(np.array(lengths), seconds, seed))
            rows += [
                {
                    "what": axis,
                    "length": length,
                    "seed": seed,
                    "step_seconds": float(took),
                    "gflop": flop / 1e9,
                }
                for length, took, flop in zip(lengths, np.median(seconds, axis=0), flops, strict=True)
            ]
            counted = {
                "flops_power": harness.power(lengths, flops),
                "flops_last_power": harness.power(lengths[-2:], flops[-2:]),
            }
            powers.append({"what": f"growth with {axis}", "seed": seed, **of_axis[-1], **counted})
        powers.append(
            {
                "what": f"growth with {axis}, over seeds",
                **{name: harness.over_seeds([each[name].value for each in of_axis]) for name in of_axis[0]},
            }
        )
    return powers + rows


def _step(axis: Axis, length: int, seed: int) -> tuple[Callable[[], object], float]:
    """A step on one document of this length, and its operations."""
    copies = length if axis == "particles" else 1
    objective = IMMConfig(particles=copies, grouping="within") if copies > 1 else FlowMatchingConfig()
    config = RunConfig(
        seed=seed,
        modalities={"text": {}, "image": {"codec": "pixels", "patch": 2, "copies": copies}},
        model=TrunkConfig(128, 4, 2, 2, 64, 384),
        objective=objective,
        train=TrainConfig(precision="bf16"),
    )
    stepper = Stepper(config, build(config), Ranks(0, 1, default_device()))
    pictures = length if axis == "pictures" else 1
    caption = {"context": length, "pictures": CAPTION + AROUND, "particles": CONTEXT}[axis] - AROUND
    draw = keyed_numpy("training_step", seed)
    document = picture_document(stepper.parts, caption, (SIDE, SIDE), draw, pictures)
    feeds = [rows_feed(stepper.parts, [document], stepper.attention.backend, seed)]
    return lambda: stepper.take(0, feeds), stepper.flops(feeds)


def grown(lengths: np.ndarray, seconds: Float[np.ndarray, "R N"], seed: int) -> dict[str, Estimate]:
    """The powers of length that seconds grow with, over all lengths and over the last two."""
    num = len(seconds)
    drawn = keyed_numpy("training_step", "rounds", seed).integers(num, size=(DRAWS, num))
    medians = np.median(seconds[drawn], axis=1)

    def estimate(part: slice) -> Estimate:
        found = harness.power(lengths[part], medians[:, part])
        low, high = np.quantile(found, [0.025, 0.975]).tolist()
        value = harness.power(lengths[part], np.median(seconds, axis=0)[part])
        return Estimate(float(value), low, high, num)

    return {"power": estimate(slice(None)), "last_power": estimate(slice(-2, None))}


if __name__ == "__main__":
    harness.run("training_step", Arguments, measure, __doc__)
