"""What a plan takes, said before it is drawn: predicted seconds against measured ones of plans that were not timed.

For each model a few calls are timed and `Calibration` is fitted to them; it then predicts other blocks, steps,
guidance, batches, prompts and texts. All calls, those of the calibration and the others, are timed in turns, round
after round, and the least of each is taken: other programs only ever add time. `error` is |predicted / measured - 1|;
`flops_only` is that of the best constant a FLOP, which knows no overhead. `flops_equal`: whether the FLOPs that were
predicted are, to the operation, those that the sampler then counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import pairwise

import numpy as np
import torch

from benchmarks import harness
from mmgen.modalities import build_modalities
from mmgen.model.model import Model
from mmgen.model.trunk import TrunkConfig
from mmgen.objectives import IMM, IMMConfig
from mmgen.sampling.calibration import Calibration, Machine
from mmgen.sampling.plan import Plan
from mmgen.sampling.predict import Work
from mmgen.sampling.probes import Probe, default_probes, fastest
from mmgen.sampling.sampler import Result, Sampler
from mmgen.tokenization.text import load_text_tokenizer
from mmgen.training.run import default_device, load


@dataclass(frozen=True)
class Arguments(harness.Arguments):
    seeds: int = 1
    """How often the whole measurement is repeated."""
    width: int = 768
    """Of the large trunk (random weights), with heads of 64 and a feed-forward of 8/3 of the width."""
    num_layers: int = 12
    """Of the large trunk."""
    threads: int = 1
    """Of torch, on the CPU."""
    rounds: int = 3
    """How often every call is timed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width < 64 or self.width % 64:
            raise ValueError(f"width {self.width} must be a multiple of 64, the size of a head")
        if min(self.threads, self.rounds, self.num_layers) < 1:
            raise ValueError("threads, rounds and num_layers must be at least 1")


def measure(arguments: Arguments) -> list[harness.Row]:
    torch.set_num_threads(arguments.threads)
    summaries: list[harness.Row] = []
    details: list[harness.Row] = []
    for seed in range(arguments.seeds):
        for name, (sampler, sizes) in _models(arguments).items():
            known, unseen = default_probes(sampler, sizes), _unseen(sampler, sizes)
            rows = _predict(sampler, known, unseen, 1 if arguments.quick else arguments.rounds)
            head = {"model": name, "seed": seed}
            for task in ("generate", "describe", "complete"):
                own = [row for row in rows if row["task"] == task]
                summaries += [{**head, "task": task, **_summary(own)}] if own else []
            summaries.append({**head, "task": "all", "calibrated_on": len(known), **_summary(rows)})
            details += [{**head, **row} for row in rows]
    return summaries + details


def _models(arguments: Arguments) -> dict[str, tuple[Sampler, tuple[int, ...]]]:
    """The shipped model and a large one of random weights, with the batch sizes that they are calibrated with."""
    torch.manual_seed(0)
    small = load(harness.ROOT / "models/emoji")
    tokenizer = load_text_tokenizer(harness.ROOT / "tokenizers/emoji-text")
    codec = str(harness.ROOT / "tokenizers/emoji-latents")
    modalities = build_modalities({"text": {}, "image": {"codec": codec, "patch": 2}}, tokenizer)
    width, layers = (128, 2) if arguments.quick else (arguments.width, arguments.num_layers)
    trunk = TrunkConfig(width, layers, width // 64, width // 64, 64, 8 * width // 3)
    model = Model(trunk, modalities, tokenizer.vocab_size).to(default_device())
    large = Sampler(model, modalities, IMM(IMMConfig()))
    parameters = model.num_parameters() / 1e6
    sizes = (1, 5, 8) if arguments.quick else (1, 8, 64)
    return {"models/emoji": (small, sizes), f"random, {parameters:.0f}M": (large, (1, 5, 8))}


def _unseen(sampler: Sampler, sizes: Sequence[int]) -> list[Probe]:
    """Calls of which no plan, batch size or prompt length is one of the calibration's."""
    between = [low + (high - low) // 2 for low, high in pairwise(sizes)]
    plans = (
        Plan(steps=3),
        Plan(steps=6, guidance=1.5),
        Plan(blocks=3, steps=(3, 1, 2)),
        Plan(blocks=2, steps=1, guidance=3.0),
        Plan(steps=5, guidance=2.0, guidance_range=(0.3, 0.8)),
        Plan(steps=4, solver="restart", shift=0.5),
    )
    probes = [
        Probe(sampler, "generate", plan, num, prompt_tokens)
        for num, prompt_tokens in zip((2, *between), (3, 10, 5), strict=True)
        for plan in plans
    ]
    for num in (2, between[1]):
        probes += [
            Probe(sampler, "describe", Plan(max_tokens=tokens, temperature=0.7), num) for tokens in (6, 40)
        ]
        probes += [Probe(sampler, "complete", Plan(max_tokens=tokens), num, prompt_tokens)
                   for tokens, prompt_tokens in ((8, 3), (40, 12))]  # fmt: skip
    return probes


def _predict(
    sampler: Sampler, known: Sequence[Probe], unseen: Sequence[Probe], rounds: int
) -> list[harness.Row]:
    probes, counted = [*known, *unseen], {}

    def call(probe: Probe) -> Result:
        result = probe.run()
        counted[probe] = replace(result.cost, seconds=0.0)
        return result

    seconds = fastest([partial(call, probe) for probe in probes], rounds)
    here = Machine.here(sampler.model.text_embedding.weight.device)
    works = [probe.work for probe in known]
    calibration = Calibration.fit(here, works, seconds[: len(known)])
    a_flop = _seconds_a_flop(works, seconds[: len(known)])
    rows = []
    for probe, took in zip(unseen, seconds[len(known) :], strict=True):
        predicted, cost = calibration.seconds(probe.work), probe.work.cost
        rows.append(
            {
                "task": probe.task,
                "call": _named(probe),
                "gflop": cost.flops / 1e9,
                "measured_ms": 1e3 * took,
                "predicted_ms": 1e3 * predicted,
                "error": abs(predicted / took - 1),
                "flops_only": abs(a_flop * cost.flops / took - 1),
                "flops_equal": counted[probe] == cost,
            }
        )
    return rows


def _named(probe: Probe) -> str:
    """The call in a few words: its requests, their tokens, and what its plan has that is not the default."""
    size = {"requests": probe.num, "prompt_tokens": probe.prompt_tokens}
    changed = {f.name: value for f in fields(Plan) if (value := getattr(probe.plan, f.name)) != f.default}
    return ", ".join(f"{name} {value}" for name, value in {**size, **changed}.items())


def _seconds_a_flop(works: Sequence[Work], seconds: Sequence[float]) -> float:
    """With the least squares of relative errors, as the calibration's."""
    rate = np.array([work.cost.flops for work in works]) / np.array(seconds)
    return float(rate.sum() / (rate**2).sum())


def _summary(rows: Sequence[harness.Row]) -> harness.Row:
    errors = np.array([row["error"] for row in rows])
    return {
        "unseen": len(rows),
        "median_error": float(np.median(errors)),
        "p90_error": float(np.quantile(errors, 0.9)),
        "worst_error": float(errors.max()),
        "flops_only": float(np.median([row["flops_only"] for row in rows])),
        "flops_equal": all(row["flops_equal"] for row in rows),
    }


if __name__ == "__main__":
    harness.run("cost", Arguments, measure, __doc__)
