"""What bfloat16 does to the gradient of Inductive Moment Matching, by time t and by how far the passes are apart.

Of a trained run: the gradient of the pictures' loss with matrix products in bfloat16, and in float32, on the same
batches with t in one bucket and the decrement of one k. Rows give the cosine between the two, how much longer the first
is, and the cosine between the float32 gradients of two different batches, which is what a batch's own noise leaves.
`python -m benchmarks.headline` makes the run that is read by default. Intervals are over batches.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import islice, pairwise, product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from benchmarks import harness
from mmgen.data.loader import Loader
from mmgen.evaluation.intervals import Estimate
from mmgen.model.attention import choose_backend
from mmgen.objectives import IMM, IMMConfig
from mmgen.objectives.base import Times
from mmgen.training.checkpoint import load_model_weights
from mmgen.training.feed import feeds
from mmgen.training.losses import compute_losses
from mmgen.training.run import Parts, build, find_checkpoint, load_run_config

EDGES = (0.0, 0.2, 0.4, 0.6, 0.8, 0.95, 0.994)  # of the buckets of t
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Arguments(harness.Arguments):
    seeds: int = 8
    """Batches for each bucket and k."""
    run: Path = Path("runs/headline/digits-imm-0")
    """A run of IMM, or one of its checkpoints."""
    k: tuple[float, ...] = (6, 8, 10, 12, 14)
    """The target pass starts (eta_max - eta_min) / 2^k nearer to the data."""
    least: tuple[float, ...] = (0.0, 0.003)
    """And at least this much nearer in time (the objective's `gap`)."""


class Bucket(IMM):
    """IMM with t uniform between two times."""

    def __init__(self, config: IMMConfig, low: float, high: float) -> None:
        super().__init__(config)
        self.low, self.high = low, high

    def draw_times(
        self,
        draw_time: Callable[[np.random.Generator], float],
        draw: np.random.Generator,
        fraction: float = 0.0,
    ) -> Times:
        def between(draw: np.random.Generator) -> float:
            t_min, t_max = self.path.time_range
            return (self.low + (self.high - self.low) * draw.random() - t_min) / (t_max - t_min)

        return super().draw_times(between, draw, fraction)


def measure(arguments: Arguments) -> list[harness.Row]:
    checkpoint = find_checkpoint(arguments.run)
    config = load_run_config(checkpoint.parent.parent)
    if not isinstance(config.objective, IMMConfig):
        raise ValueError(f"{arguments.run} was trained by {config.objective.name}, not by imm")
    parts = build(config)
    parts.model.load_state_dict(load_model_weights(checkpoint, "model"))
    backend = choose_backend(
        config.train.attention, CPU, config.model.head_dim, config.train.precision
    ).backend
    batches = 2 if arguments.quick else arguments.seeds
    rows: list[harness.Row] = []
    for least, k in product(arguments.least, arguments.k):
        for low, high in pairwise(EDGES):
            # times in the bucket alone, jumps alone, and no pair left out for being near
            asked = replace(
                config.objective,
                k=k,
                k_final=None,
                gap=least,
                floor=IMMConfig.floor,
                anchors=0.0,
                anchors_final=None,
                from_noise=0.0,
            )
            objective = Bucket(asked, low, high)
            here = replace(parts, objective=objective)
            loader = Loader(config.data, parts.modalities, config.seed, objective.grouping)
            made = feeds([loader], objective, config.seed, backend, step=0, total_steps=1)
            exact, narrow = [], []
            for feed, _ in islice(made, batches):
                for precision, found in (("float32", exact), ("bf16", narrow)):
                    loss = compute_losses(here, feed, precision, CPU)["image"].mean()
                    found.append(_gradient(here, loss))
            rows.append(
                {
                    "k": k,
                    "least": least,
                    "t_low": low,
                    "t_high": high,
                    "gap": float(_gap(objective, (low + high) / 2)),
                    "cosine": _mean(
                        cosine_similarity(a, b, dim=0) for a, b in zip(exact, narrow, strict=True)
                    ),
                    "length": _mean(b.norm() / a.norm() for a, b in zip(exact, narrow, strict=True)),
                    "cosine_of_batches": _mean(cosine_similarity(a, b, dim=0) for a, b in pairwise(exact)),
                }
            )
    return rows


def _gradient(parts: Parts, loss: Tensor) -> Tensor:
    """Of everything that the pictures' loss reaches, in one vector."""
    loss.backward()
    found = [p.grad.flatten() for p in parts.model.parameters() if p.grad is not None]
    parts.model.zero_grad(set_to_none=True)
    return torch.cat(found)


def _gap(objective: IMM, t: float) -> Tensor:
    return t - objective.target_time(t, 0.0)


def _mean(values: Iterable[Tensor]) -> Estimate:
    return harness.over_seeds([float(value) for value in values])


if __name__ == "__main__":
    harness.run("imm_precision", Arguments, measure, __doc__)
