"""`mmgen estimate CONFIG [--gpus N] [--a.b value ...]`: what a training will take, before anybody rents a GPU."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from mmgen.cli.arguments import parse_with_config
from mmgen.cli.tables import amount, print_line, print_table, si
from mmgen.devices import find_device
from mmgen.training.cluster import Cluster
from mmgen.training.estimate import Estimate, estimate
from mmgen.training.run import RunConfig

PROG = "mmgen estimate"


@dataclass(frozen=True)
class Arguments:
    """Parameters, operations, memory, communication and time of a training, from its YAML file CONFIG alone. Any value
    of CONFIG can be changed by --a.b value, as for `mmgen train`.
    """

    gpus: int = 1
    """GPUs in all"""
    device: str = "h200"
    """one of mmgen/devices.py, of which datasheet figures are known"""
    node: int = 8
    """GPUs of a node, joined by the device's link"""
    network: float = 50.0
    """GB a second in one direction between nodes, of each GPU's adapter"""
    mfu: float = 0.45
    """share of the dense peak at which products run: an assumption"""
    tokens: float | None = None
    """tokens of both streams to train on; those of train.steps steps where not given"""
    json: bool = False
    """print JSON instead of tables; operations, bytes and seconds in plain units"""


def main(argv: Sequence[str]) -> int:
    args, config, path = parse_with_config(Arguments, RunConfig, argv, PROG)
    device = find_device(args.device)
    replicas = config.train.replicas
    if args.gpus % replicas:
        raise ValueError(f"train.replicas {replicas} does not divide the {args.gpus} GPUs")
    cluster = Cluster(device, args.gpus, args.gpus // replicas, args.node, args.network * 1e9, args.mfu)
    found = estimate(config, cluster, args.tokens)
    if args.json:
        print(json.dumps(_record(found, cluster, args), indent=1))
    else:
        _show(found, cluster, args, path)
    return 0


def _record(found: Estimate, cluster: Cluster, args: Arguments) -> dict[str, Any]:
    """The estimate with its sums and what was assumed."""
    record = dataclasses.asdict(found)
    record["parameters"]["total"] = sum(found.parameters.values())
    for name in ("tokens", "attended", "computed", "memory", "communication"):
        record[name]["total"] = getattr(found, name).total
    for name in ("step", "days", "gpu_hours"):
        record["time"][name] = getattr(found.time, name)
    record["fits"] = found.memory.total <= cluster.device.memory
    assumed = dataclasses.asdict(args)
    del assumed["json"]
    record["assumed"] = {**assumed, "device": dataclasses.asdict(cluster.device)}
    return record


def _show(found: Estimate, cluster: Cluster, args: Arguments, path: str) -> None:
    console = Console()
    device, time, tokens = cluster.device, found.time, found.tokens
    layout = f", {cluster.replicas} copies of {cluster.group} shards" if cluster.gpus > 1 else ""
    print_line(console, f"{path} on {cluster.gpus} x {device.name}{layout}")
    total = sum(found.parameters.values())
    rows = [(name, amount(count), f"{count / total:.0%}") for name, count in found.parameters.items()]
    print_table(console, ("parameters", "", "share"), [*rows, ("total", amount(total), "")])
    pictures = [("pictures", amount(tokens.pictures))] if tokens.pictures else []
    print_table(
        console,
        ("a step", "tokens"),
        [("context stream", amount(tokens.context)), ("state stream", amount(tokens.state)), *pictures],
    )
    parts = [each.name for each in dataclasses.fields(found.computed)]
    rows = [
        (name.replace("_", " "), si(getattr(found.attended, name)), si(getattr(found.computed, name)))
        for name in parts
        if getattr(found.computed, name)
    ]
    rows.append(("total", si(found.attended.total), si(found.computed.total)))
    if found.recomputed:
        rows.append(("recomputed", "", si(found.recomputed)))
    if found.muon:
        rows.append(("Muon, a shard group", "", si(found.muon)))
    print_table(console, ("FLOPs of a step", "attended", f"computed ({found.attention})"), rows)
    memory = [
        (name, f"{value / 1e9:.2f}") for name, value in dataclasses.asdict(found.memory).items() if value
    ]
    verdict = "fits" if found.memory.total <= device.memory else "DOES NOT FIT"
    print_table(
        console,
        ("memory of a GPU", "GB"),
        [
            *memory,
            ("total", f"{found.memory.total / 1e9:.2f}"),
            (f"{device.name}: {verdict}", f"{device.memory / 1e9:.0f}"),
        ],
    )
    sent = [
        (name.replace("_", " "), f"{value / 1e9:.2f}")
        for name, value in dataclasses.asdict(found.communication).items()
        if value and name != "seconds"
    ]
    if sent:
        print_table(console, ("sent by a GPU in a step", "GB"), sent)
    print_table(
        console,
        ("time", ""),
        [
            ("products", f"{time.compute:.3g} s"),
            ("communication (beside them)", f"{time.communication:.3g} s"),
            ("update", f"{time.update:.3g} s"),
            ("step", f"{time.step:.3g} s"),
            ("MFU (attended, nothing counted twice)", f"{time.mfu:.1%}"),
            ("tokens a second", amount(tokens.total / time.step)),
            (f"{time.steps:,.0f} steps, {amount(time.steps * tokens.total)} tokens", f"{time.days:.3g} days"),
            ("GPU-hours", f"{time.gpu_hours:,.0f}"),
        ],
    )
    print_line(
        console,
        f"Assumed, not measured: products at {args.mfu:g} of the dense peak ({si(device.peak)}FLOP/s), datasheet "
        "bandwidths, communication beside the products, rows full of captions with a picture each.",
    )
