"""`mmgen bench train CONFIG` and `mmgen bench sample RUN`: how fast training and sampling are on this machine."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import tyro
from rich.console import Console

from mmgen.cli.arguments import check_graphs, parse, parse_with_config
from mmgen.cli.tables import amount, print_line, print_table, si
from mmgen.evaluation.tradeoff import TradeoffConfig
from mmgen.modalities import bands
from mmgen.sampling.calibration import Machine
from mmgen.sampling.graphs import EAGER
from mmgen.sampling.sampler import SamplingPrecision
from mmgen.sampling.speed import SamplingSpeed, measure_sampling, picture_probes, text_probes
from mmgen.training.run import RunConfig, load
from mmgen.training.speed import TrainingSpeed, measure_training
from mmgen.versions import versions

PROG = "mmgen bench"
USAGE = """usage: mmgen bench train CONFIG [--steps N] [--warmup N] [--synthetic] [--json] [--a.b value ...]
       mmgen bench sample RUN [--blocks ...] [--steps ...] [--guidance ...] [--batch-sizes ...] [--json]

Times training steps of a YAML file, or calls of a trained run, on this machine. Nothing is written.

`mmgen bench train --help` and `mmgen bench sample --help` explain their options."""


@dataclass(frozen=True)
class Train:
    """Tokens and pictures a second, step time, memory and MFU of training the YAML file CONFIG, on a fresh model. Any
    value of CONFIG can be changed by --a.b value, as for `mmgen train`. Under torchrun all its processes train.
    """

    steps: int = 20
    """steps that are timed; up to 5 more are timed in parts"""
    warmup: int = 5
    """steps before them: memory is found, workers start, blocks are compiled"""
    synthetic: bool = False
    """full rows of made-up documents in place of the data, which need not be there"""
    json: bool = False
    """print JSON instead of tables"""


@dataclass(frozen=True)
class Sample:
    """Latency and throughput of pictures over plans, and tokens a second of text, of a trained run."""

    run: Annotated[str, tyro.conf.Positional]
    """folder of a run, or one of its checkpoints"""
    blocks: tuple[int, ...] = (1,)
    """numbers of autoregressive blocks of a picture"""
    steps: tuple[int, ...] = (1, 2, 4, 8)
    """numbers of refinement steps of a block"""
    guidance: tuple[float, ...] = (1.0, 2.0)
    """1 is none; others cost two network evaluations a step"""
    batch_sizes: tuple[int, ...] = (1, 8)
    """numbers of requests that are drawn together"""
    prompt_tokens: int = 8
    """of each request"""
    max_tokens: int = 32
    """of each text, which may end before"""
    precision: SamplingPrecision = "float32"
    """of matrix products and the cache: float32 or bf16"""
    graphs: bool = False
    """on a GPU: record what is called again and again as CUDA graphs, and replay it"""
    repeats: int = 5
    """how often each call is timed"""
    json: bool = False
    """print JSON instead of tables"""

    def __post_init__(self) -> None:
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ValueError(f"batch_sizes {self.batch_sizes} must be numbers of at least 1")
        if self.prompt_tokens < 1:
            raise ValueError(f"prompt_tokens {self.prompt_tokens} must be at least 1")
        if self.repeats < 1:
            raise ValueError(f"repeats {self.repeats} must be at least 1")


def main(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    what, *rest = argv
    if what == "train":
        return _train(rest)
    if what == "sample":
        return _sample(rest)
    raise ValueError(f"the first word after `{PROG}` is train or sample, not {what}")


def _train(argv: Sequence[str]) -> int:
    args, config, path = parse_with_config(Train, RunConfig, argv, f"{PROG} train")
    found = measure_training(config, args.steps, args.warmup, args.synthetic)
    if found is None:  # the first rank tells
        return 0
    if args.json:
        print(json.dumps(_training_record(found, args, path), indent=1))
    else:
        _show_training(found, args, path)
    return 0


def _training_record(found: TrainingSpeed, args: Train, path: str) -> dict[str, Any]:
    """Seconds, bytes and operations in plain units."""
    return {
        "config": path,
        "steps_timed": args.steps,
        "synthetic": args.synthetic,
        "versions": versions(),
        **dataclasses.asdict(found),
        "step_seconds": found.step,
        "step_spread": found.spread,
        "per_second": found.per_second,
        "data_wait": found.data_wait,
        "flops_per_second": found.flops_per_second,
        "mfu": found.mfu,
    }


def _show_training(found: TrainingSpeed, args: Train, path: str) -> None:
    console = Console()
    documents = "full rows of made-up documents" if args.synthetic else "its own data"
    print_line(console, f"{path}: {found.what}")
    print_line(console, f"{_machine(found.machine)}; {args.steps} steps after {args.warmup}, {documents}")
    low, high = found.spread
    rows = [(f"{name} a second", amount(value)) for name, value in found.per_second.items()]
    rows += [
        ("step, median", f"{found.step:.3g} s"),
        ("eight of ten steps", f"{low:.3g} to {high:.3g} s"),
        ("waiting for data", f"{found.data_wait:.1%}"),
        ("memory, most", f"{found.memory_gb:.3g} GB"),
        ("operations a second, each device", f"{si(found.flops_per_second)}FLOP/s"),
        ("MFU", "peak not known" if found.mfu is None else f"{found.mfu:.1%}"),
    ]
    print_table(console, ("training", ""), rows)
    whole = sum(found.parts.values())
    parts = [
        (name, f"{1000 * seconds:.3g}", f"{seconds / whole:.0%}") for name, seconds in found.parts.items()
    ]
    print_table(console, ("where a step goes", "ms", "share"), parts)


def _sample(argv: Sequence[str]) -> int:
    args = parse(Sample, argv, f"{PROG} sample")
    check_graphs(args.graphs)
    sampler = load(args.run, precision=args.precision, graphs=args.graphs)
    probes = text_probes(sampler, args.batch_sizes, args.prompt_tokens, args.max_tokens)
    if "image" in sampler.modalities:
        axes = {"blocks": args.blocks, "steps": args.steps, "guidance": args.guidance}
        plans = TradeoffConfig(axes).plans(replace(sampler.plan, candidates=1, thinking=0))
        for blocks in args.blocks:  # said before anything is timed
            bands(*sampler.image.token_grid(*sampler.size), blocks)
        probes = picture_probes(sampler, plans, args.batch_sizes, args.prompt_tokens) + probes
    machine = Machine.here(sampler.model.text_embedding.weight.device)
    # recorded in the round after EAGER ones, and replayed from then on
    found = measure_sampling(probes, args.repeats, EAGER + 1 if args.graphs else 1)
    if args.json:
        record = {
            "run": args.run,
            "precision": args.precision,
            "graphs": args.graphs,
            "machine": dataclasses.asdict(machine),
            "versions": versions(),
        }
        print(json.dumps({**record, "calls": [_sampling_record(each) for each in found]}, indent=1))
    else:
        _show_sampling(found, args, machine)
    return 0


def _sampling_record(found: SamplingSpeed) -> dict[str, Any]:
    """Seconds, bytes and operations in plain units."""
    return {
        "task": found.probe.task,
        "requests": found.probe.num,
        "prompt_tokens": found.probe.prompt_tokens,
        "plan": dataclasses.asdict(found.probe.plan),
        "seconds": found.seconds,
        "latency": found.latency,
        "spread": found.spread,
        "per_second": found.per_second,
        "flops_per_second": found.flops_per_second,
        "cost": dataclasses.asdict(found.cost),
    }


def _show_sampling(found: Sequence[SamplingSpeed], args: Sample, machine: Machine) -> None:
    console = Console()
    print_line(
        console, f"{args.run} in {args.precision}; {_machine(machine)}; each call timed {args.repeats} times"
    )
    measured = ("ms", "90 %", "/s", "GFLOP/s", "MB")
    pictures = [each for each in found if each.probe.task == "generate"]
    if pictures:
        rows = [
            (
                str(each.probe.num),
                *(f"{getattr(each.probe.plan, name):g}" for name in ("blocks", "steps", "guidance")),
                *_measured(each),
            )
            for each in pictures
        ]
        print_table(console, ("pictures", "blocks", "steps", "guidance", *measured), rows)
    rows = [
        (
            str(each.probe.num),
            str(each.probe.plan.tokens_per_pass),
            f"{each.cost.tokens / each.cost.passes:.2f}" if each.cost.passes else "",
            str(each.cost.tokens),
            *_measured(each),
        )
        for each in found
        if each.probe.task == "complete"
    ]
    print_table(console, ("texts", "a pass", "kept", "tokens", *measured), rows)
    print_line(
        console,
        "ms: the median call, with the autoencoder; 90 %: what nine of ten calls take at most. /s: pictures, or "
        "tokens of all texts. GFLOP/s: masked keys counted, the autoencoder not. MB: keys and values of the batch.",
    )


def _measured(found: SamplingSpeed) -> tuple[str, ...]:
    return (
        f"{1e3 * found.latency:.3g}",
        f"{1e3 * found.spread[1]:.3g}",
        amount(found.per_second),
        f"{found.flops_per_second / 1e9:.3g}",
        f"{found.cost.memory / 1e6:.3g}",
    )


def _machine(machine: Machine) -> str:
    threads = f", {machine.threads} threads" if machine.device == "cpu" else ""
    numbers = ", ".join(f"{name} {number}" for name, number in versions().items() if name != "python")
    return f"{machine.processor}, {machine.device}{threads}, {numbers}"
