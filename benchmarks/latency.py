"""What a token of text and a refinement step of a picture take at batch 1, by a configuration's trunk: milliseconds.

Weights are random and texts are made up, so the configuration's data, tokenizer and autoencoder need not be there. Each
figure is a slope: two lengths of text (two numbers of steps), timed in turns, so that what a request takes once (its
prompt, its start) is in neither. `floor_ms` is what it takes to read the weights and the cached keys and values once,
at the speed at which this device was found to copy memory; `share` is the floor's of the time. On a GPU the calls are
recorded as CUDA graphs, and once more without (`graphs`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from benchmarks import harness
from mmgen.config import load_yaml
from mmgen.evaluation.intervals import Estimate
from mmgen.modalities import Image, build_modalities
from mmgen.model.model import Model
from mmgen.objectives import build_objective
from mmgen.sampling.cost import Cost
from mmgen.sampling.graphs import EAGER
from mmgen.sampling.plan import Plan
from mmgen.sampling.probes import Probe, timed
from mmgen.sampling.sampler import Sampler, SamplingPrecision
from mmgen.tokenization.latents import CodecOutline
from mmgen.tokenization.text import TokenizerOutline, outline_text_tokenizer
from mmgen.training.run import RunConfig, default_device

COPIED = 2**28  # bytes, more than caches hold


@dataclass(frozen=True)
class Arguments(harness.Arguments):
    seeds: int = 1
    """How often the whole measurement is repeated, with other weights."""
    config: Path = Path("configs/t2i-1b.yaml")
    """Whose trunk, vocabulary and picture size."""
    precision: SamplingPrecision = "bf16"
    texts: tuple[int, int] = (32, 160)
    """Tokens of the two texts."""
    steps: tuple[int, int] = (2, 10)
    """Refinement steps of the two pictures."""
    guidance: tuple[float, ...] = (1.0, 2.0)
    """1 is none; others read both conditions in one call."""
    prompt_tokens: int = 16
    repeats: int = 10
    """Rounds of all calls that are timed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, (few, many) in (("texts", self.texts), ("steps", self.steps)):
            if not 1 <= few < many:
                raise ValueError(f"{name} {few} {many} must be two numbers that rise, of at least 1")
        if self.repeats < 2 or self.prompt_tokens < 1:
            raise ValueError("repeats must be at least 2, and prompt_tokens at least 1")


class Numbers(TokenizerOutline):
    """As many ids as a tokenizer has; a text is the numbers of its ids."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(str(int(each)) for each in ids if each not in self.specials)


class Blank(CodecOutline):
    """Latents as large as a codec's, whose pictures are all grey."""

    def _decode(self, latents: Tensor) -> Tensor:
        return latents.new_zeros(len(latents), 3, *(self.downsample * side for side in latents.shape[2:]))


def measure(arguments: Arguments) -> Iterator[harness.Row]:
    path = Path("configs/smoke.yaml") if arguments.quick else arguments.config
    config, device = load_yaml(path, RunConfig), default_device()
    speed = copy_speed(device)
    yield {"what": "copying memory", "gb_per_second": speed / 1e9}
    for seed in range(arguments.seeds):
        for graphs in (True, False) if device.type == "cuda" else (False,):
            sampler = random_sampler(config, arguments.precision, graphs, seed)
            for few, many in pairs(sampler, arguments):
                yield _row(few, many, 2 if arguments.quick else arguments.repeats, seed, speed)


def _row(few: Probe, many: Probe, repeats: int, seed: int, speed: float) -> harness.Row:
    sampler, costs = many.sampler, [probe.run().cost for probe in (few, many)]
    # recorded in the round after the eager ones
    warmup = 1 if sampler.graphs is None else EAGER + 1
    seconds = timed([few.run, many.run], repeats, warmup)
    first, last = (size(probe, cost) for probe, cost in zip((few, many), costs, strict=True))
    ms = slope(1e3 * seconds, last - first, seed)
    floor = 1e3 * bytes_read(many, costs[1]) / speed
    return {
        "what": "a token" if many.task == "complete" else "a step",
        "guidance": many.plan.guidance if many.task == "generate" else None,
        "parameters": sampler.model.num_parameters(),
        "precision": sampler.precision,
        "graphs": sampler.graphs is not None,
        "seed": seed,
        "from": first,
        "to": last,
        "ms": ms,
        "per_second": 1e3 / ms.value,
        "request_ms": 1e3 * float(np.median(seconds[:, 1])),
        "floor_ms": floor,
        "share": floor / ms.value,
    }


def random_sampler(config: RunConfig, precision: SamplingPrecision, graphs: bool, seed: int) -> Sampler:
    """The configuration's model with random weights, and what stands for its tokenizer and its autoencoder."""
    torch.manual_seed(seed)
    tokenizer = Numbers(outline_text_tokenizer(config.tokenizer).vocab_size)
    modalities = build_modalities(config.modalities, tokenizer, outline=True)
    image = modalities["image"]
    assert isinstance(image, Image), "steps are of pictures"
    image.codec = Blank(image.codec.channels, image.codec.downsample)
    model = Model(config.model, modalities, tokenizer.vocab_size)
    if precision == "bf16":
        model.trunk.narrow_weights()
    objective = build_objective(config.objective)
    return Sampler(
        model.to(default_device()), modalities, objective, config.size, precision=precision, graphs=graphs
    )


def pairs(sampler: Sampler, arguments: Arguments) -> list[tuple[Probe, Probe]]:
    """One request each: texts of two lengths, and pictures of two numbers of steps for each guidance."""
    texts = [
        Probe(sampler, "complete", Plan(max_tokens=num), 1, arguments.prompt_tokens)
        for num in arguments.texts
    ]
    found = [(texts[0], texts[1])]
    for guidance in arguments.guidance:
        plans = (Plan(steps=num, guidance=guidance) for num in arguments.steps)
        few, many = (Probe(sampler, "generate", plan, 1, arguments.prompt_tokens) for plan in plans)
        found.append((few, many))
    return found


def size(probe: Probe, cost: Cost) -> int:
    """Of what is counted: tokens that are written, which may end before the plan's, or refinement steps."""
    return cost.tokens if probe.task == "complete" else probe.plan.block_steps[0]


def slope(values: Float[np.ndarray, "R 2"], num: int, seed: int) -> Estimate:
    """The median over rounds of what each of `num` more adds, with a bootstrap interval of 95 %."""
    return harness.median((values[:, 1] - values[:, 0]) / num, "latency", seed)


def bytes_read(probe: Probe, cost: Cost) -> float:
    """Of the weights that a token or a step passes, and of the keys and values that are held."""
    model = probe.sampler.model
    parts: list[nn.Module | None] = [model.trunk]
    if probe.task == "complete":
        parts.append(model.text_head or model.text_embedding)
    else:
        parts += [model.embeddings, model.heads, model.state_norm, model.time_embedding, model.modulation]
    weights = sum(each.nbytes for part in parts if part is not None for each in part.parameters())
    return weights + cost.memory


def copy_speed(device: torch.device) -> float:
    """Bytes a second that are read and written by a copy, the best of ten."""
    source = torch.zeros(COPIED, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    best = min(harness.seconds(partial(target.copy_, source)) for _ in range(10))
    return 2 * COPIED / best


if __name__ == "__main__":
    harness.run("latency", Arguments, measure, __doc__)
