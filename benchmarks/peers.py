"""mmgen beside what else does the work: the same work in one run, timed in turns, on the CPU.

Training steps on text and pictures, and pictures of texts, against transfusion-pytorch; greedy text against
transformers with the same weights; pictures against diffusers' DiT. `theirs_over_ours` is the peer's time over mmgen's:
above 1 mmgen is the faster. Its interval is over seeds (of one seed: over pairs of timings). Weights are random: what
they are decides no time. What the sides do not have in common is in docs/speed.md. A peer that is not installed is left
out.
"""

import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from benchmarks import harness
from benchmarks.peer_calls import (
    HEAD_DIM,
    Case,
    Matched,
    Precision,
    Sizes,
    joint_sampling,
    pictures,
    text_decoding,
    training,
)

PEERS = {
    "transfusion-pytorch": "transfusion_pytorch",
    "transformers": "transformers",
    "diffusers": "diffusers",
}


@dataclass(frozen=True)
class Arguments(harness.Arguments):
    width: int = 256
    """Of the trunks, with heads of 64."""
    num_layers: int = 6
    """Of the trunks."""
    documents: int = 8
    """Captions with a picture each, of a training step."""
    side: int = 8
    """Tokens of a picture's height and width."""
    steps: int = 4
    """Network evaluations of a picture; twice as many where it is guided."""
    max_tokens: int = 48
    """Text tokens that are decoded."""
    batch: tuple[int, ...] = (1, 16)
    """Requests that are sampled together."""
    repeats: int = 6
    """Pairs of timings, for each seed."""
    threads: int = 1
    """Of torch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width < HEAD_DIM or self.width % HEAD_DIM:
            raise ValueError(f"width {self.width} must be a multiple of {HEAD_DIM}, the size of a head")
        for name in ("num_layers", "documents", "side", "steps", "max_tokens", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")


def measure(arguments: Arguments) -> list[harness.Row]:
    torch.set_num_threads(arguments.threads)
    missing = [name for name, module in PEERS.items() if find_spec(module) is None]
    for name in missing:
        print(
            f"{name} is not installed: its rows are left out (pip install 'mmgen-pretrain[peers]')",
            file=sys.stderr,
        )
    repeats = 2 if arguments.quick else arguments.repeats
    found: dict[tuple, list[harness.Comparison]] = {}
    facts: dict[tuple, harness.Row] = {}
    for seed in range(1 if arguments.quick else arguments.seeds):
        for case in _cases(arguments, seed, set(PEERS) - set(missing)):
            key = case.task, case.peer, case.matched, case.precision, case.batch
            timed = harness.compare(case.theirs, case.ours, repeats=repeats, warmup=1, seed=seed)
            found.setdefault(key, []).append(timed)
            facts[key] = _facts(case)
    return [_row(facts[key], timed) for key, timed in found.items()]


def _cases(arguments: Arguments, seed: int, peers: set[str]) -> Iterator[Case]:
    quick = arguments.quick
    width, layers, side = (64, 2, 4) if quick else (arguments.width, arguments.num_layers, arguments.side)
    max_tokens = 8 if quick else arguments.max_tokens
    sizes = Sizes(width, layers, arguments.documents, side, arguments.steps, max_tokens)
    batch = (1, 2) if quick else arguments.batch
    # transfusion-pytorch's modulations are made for every token: mmgen has no such blocks
    matched: tuple[Matched, ...] = ("sizes", "parameters")
    precisions: tuple[Precision, ...] = ("float32", "bf16")
    if "transfusion-pytorch" in peers:
        yield from training(sizes, matched, precisions, seed)
        yield from joint_sampling(sizes, matched, precisions, batch, seed)
    if "transformers" in peers:
        yield from text_decoding(sizes, batch, seed)
    if "diffusers" in peers:
        yield from pictures(sizes, ("sizes", "blocks", "parameters"), precisions, batch, seed)


def _facts(case: Case) -> harness.Row:
    ours, theirs = case.parameters
    return {
        "task": case.task,
        "peer": case.peer,
        "matched": case.matched,
        "precision": case.precision,
        "batch": case.batch,
        "tokens": case.tokens,
        "our_parameters": ours,
        "their_parameters": theirs,
    }


def _row(facts: harness.Row, timed: list[harness.Comparison]) -> harness.Row:
    theirs, ours = (statistics.fmean(getattr(each, side) for each in timed) for side in ("a", "b"))
    ratios = [each.ratio.value for each in timed]
    return {
        **facts,
        "our_seconds": ours,
        "their_seconds": theirs,
        "our_tokens_per_second": facts["tokens"] / ours,
        "their_tokens_per_second": facts["tokens"] / theirs,
        "theirs_over_ours": timed[0].ratio if len(timed) == 1 else harness.over_seeds(ratios),
    }


if __name__ == "__main__":
    harness.run("peers", Arguments, measure, __doc__)
