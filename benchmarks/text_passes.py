"""Several tokens a pass of the trunk, on dictionary glosses and captions: how many are kept, and what time it saves.

Trains `configs/text.yaml` once with every head and seed, all of them saying the next 8 tokens. Each then continues the
first tokens of held-out texts with 1 to 8 tokens a pass, verified, so that the law is the trunk's own. `kept`: tokens
that a pass commits (1 a pass is autoregression); `speed`: tokens a second over those of autoregression with the same
checkpoint, timed in turns; `flops_ratio`: operations a token over autoregression's. `bits_per_byte` is the trunk's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks import arms, harness
from data_pipelines import text as text_pipeline
from mmgen.config import load_yaml
from mmgen.data.source import SourceConfig
from mmgen.evaluation.real import read_split
from mmgen.model.joint import JointConfig, JointKind
from mmgen.sampling.plan import Plan
from mmgen.sampling.sampler import Sampler
from mmgen.training.run import RunConfig, load

CONFIG = "text"
HEADS: tuple[JointKind, ...] = ("independent", "mixture", "hmm", "chain")
# source -> the split that no training saw, and the level of detail that is continued
HELD_OUT = {"glosses": ("validation", "text"), "captions": ("unseen_concepts", "tags")}


@dataclass(frozen=True)
class Arguments(harness.Arguments):
    heads: tuple[JointKind, ...] = HEADS
    """Each trained with a trunk of its own."""
    tokens: tuple[int, ...] = (2, 4, 8)
    """Tokens a pass."""
    temperature: tuple[float, ...] = (1.0, 0.0)
    """0 takes the likeliest token."""
    num: int = 64
    """Texts that are continued, of each source."""
    prompt_tokens: int = 4
    """Of a text, given to begin with."""
    max_tokens: int = 32
    """Written for each."""
    repeats: int = 5
    """Pairs of timings."""
    train_steps: int | None = None
    """The configuration's where it is not given."""
    runs: Path = Path("runs/text_passes")
    """Where runs are kept; one that is there is continued, or taken as it is."""
    workers: int = 2
    """Runs trained side by side, with a thread each."""


def measure(arguments: Arguments) -> list[harness.Row]:
    config = _prepare()
    steps = 20 if arguments.quick else arguments.train_steps or config.train.steps
    runs = {
        (head, seed): arms.Run(
            arguments.runs / f"{head}-{seed}-{steps}",
            CONFIG,
            "flow_matching",
            seed,
            steps,
            {"joint.kind": head},
        )
        for seed in range(arguments.seeds)
        for head in arguments.heads
    }
    arms.train(list(runs.values()), arguments.workers)
    rows: list[harness.Row] = []
    for (head, seed), run in runs.items():
        sampler = load(run.folder)
        for source in config.data.sources:
            texts = _texts(config.data.sources[source], source, 4 if arguments.quick else arguments.num)
            name = {"head": head, "seed": seed, "source": source}
            bits = _bits(sampler, texts)
            for temperature in arguments.temperature:
                for tokens in arguments.tokens:
                    row = _compare(sampler, texts, tokens, temperature, seed, arguments)
                    rows.append({**name, "tokens": tokens, "temperature": temperature, **row, **bits})
    return rows + _over_seeds(rows)


def _prepare() -> RunConfig:
    config = load_yaml(Path(f"configs/{CONFIG}.yaml"), RunConfig)
    folder = Path(str(config.data.sources["glosses"].path))
    if not folder.exists():
        text_pipeline.build(text_pipeline.Options(folder, glosses=True))
    assert isinstance(config.joint, JointConfig)
    return config


def _texts(source: SourceConfig, name: str, num: int) -> list[str]:
    split, level = HELD_OUT[name]
    samples = read_split(source, split, limit=4 * num)
    return [sample.captions[level] for sample in samples if sample.captions.get(level)][:num]


def _bits(sampler: Sampler, texts: Sequence[str]) -> harness.Row:
    nats, num_bytes = sampler.bits(texts)
    return {"bits_per_byte": float(nats.sum() / num_bytes.sum() / np.log(2))}


def _compare(
    sampler: Sampler, texts: Sequence[str], tokens: int, temperature: float, seed: int, arguments: Arguments
) -> harness.Row:
    tokenizer = sampler.text.tokenizer
    prompts = [tokenizer.decode(tokenizer.encode(text)[: arguments.prompt_tokens]) for text in texts]
    one = Plan(max_tokens=arguments.max_tokens, temperature=temperature)
    several = replace(one, tokens_per_pass=tokens)
    written = {plan: sampler.complete(prompts, plan, seed).cost for plan in (one, several)}
    # the two draw other texts of one law, so times are compared a token
    timed = harness.compare(
        lambda: sampler.complete(prompts, one, seed),
        lambda: sampler.complete(prompts, several, seed),
        repeats=2 if arguments.quick else arguments.repeats,
        warmup=1,
    )
    speed = harness.scaled(timed.ratio, written[several].tokens / written[one].tokens)
    # over autoregression's, which is not 1: the first token of a text needs no pass
    kept = written[several].tokens / written[several].passes * written[one].passes / written[one].tokens
    flops = [cost.flops / cost.tokens for cost in (written[several], written[one])]
    return {"kept": kept, "speed": speed, "flops_ratio": flops[0] / flops[1]}


def _over_seeds(rows: Sequence[harness.Row]) -> list[harness.Row]:
    found: dict[tuple[object, ...], list[harness.Row]] = {}
    for row in rows:
        found.setdefault((row["head"], row["source"], row["tokens"], row["temperature"]), []).append(row)
    return [
        {
            "head": f"{head}, over seeds",
            "source": source,
            "tokens": tokens,
            "temperature": temperature,
            "kept": harness.over_seeds([row["kept"] for row in own]),
            "speed": harness.over_seeds([row["speed"].value for row in own]),
            "flops_ratio": harness.over_seeds([row["flops_ratio"] for row in own]),
            "bits_per_byte": harness.over_seeds([row["bits_per_byte"] for row in own]),
        }
        for (head, source, tokens, temperature), own in found.items()
    ]


if __name__ == "__main__":
    harness.run("text_passes", Arguments, measure, __doc__)
