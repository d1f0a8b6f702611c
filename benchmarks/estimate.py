"""What `mmgen estimate` says of a training step against what a real one does, for several small models on the CPU.

`flops` are of a whole step, forward and backward, against torch's own count under the plain attention kernel (which
does every product). `kept` are bytes of weights, gradients, optimizer state and averages. `saved` are bytes that the
forward pass keeps for the backward one, each storage once. `rss` is the most that a process of its own held beyond what
it held before the model was built, over two steps and an update each: a sanity check of the sum, in which the
allocator, the libraries' buffers and copies that no formula knows have a part.
"""

import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import harness
from mmgen.data.loader import DataConfig
from mmgen.data.pack import PackConfig
from mmgen.devices import find_device
from mmgen.model.joint import JointConfig
from mmgen.model.trunk import TrunkConfig
from mmgen.objectives import FlowMatchingConfig, IMMConfig
from mmgen.sampling.predict import ModelFacts
from mmgen.training.cluster import Cluster
from mmgen.training.ema import Ema
from mmgen.training.estimate import estimate
from mmgen.training.feed import Feed
from mmgen.training.flops import Work, step_flops
from mmgen.training.losses import compute_losses, weighted
from mmgen.training.memory import (
    logits_gradient_bytes,
    mask_pairs,
    saved_bytes,
    target_bytes,
    working_bytes,
)
from mmgen.training.optim import OptimConfig, build_optimizer
from mmgen.training.run import Parts, RunConfig, TrainConfig, build
from mmgen.training.synthetic import full_feed

SIDE = 8  # tokens of a picture's height and width
CPU = torch.device("cpu")
STEPS = 2


@dataclass(frozen=True)
class Arguments(harness.Arguments):
    seeds: int = 1
    """How often the whole measurement is repeated; nothing but `rss` can differ."""


class Storages:
    """Bytes of the tensors that were shown, each storage once."""

    def __init__(self) -> None:
        self._kept: dict[int, Tensor] = {}  # alive, so that no address is used again

    def add(self, tensor: Tensor) -> Tensor:
        self._kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    def total(self, without: Iterable[Tensor] = ()) -> int:
        known = {tensor.untyped_storage().data_ptr() for tensor in without}
        return sum(t.untyped_storage().nbytes() for place, t in self._kept.items() if place not in known)


def cases(quick: bool) -> dict[str, RunConfig]:
    """Configurations that differ in what a formula could get wrong."""
    small = RunConfig(
        size=(2 * SIDE, 2 * SIDE),
        modalities={"text": {}, "image": {"codec": "pixels", "patch": 2}},
        model=TrunkConfig(128, 2, 4, 2, 32, 384),
        data=DataConfig(pack=PackConfig(2, 128, 256)),
        train=TrainConfig(precision="float32"),
    )
    found = {"flow matching": small, "imm": replace(small, objective=IMMConfig())}
    if quick:
        return found
    trunk, pack = TrunkConfig(384, 6, 6, 3, 64, 1152), PackConfig(2, 256, 512)
    wide = replace(small, model=trunk, data=DataConfig(pack=pack))
    return {
        **found,
        "flow matching, bf16": replace(small, train=TrainConfig(precision="bf16")),
        "wide": replace(wide, objective=IMMConfig()),
        "wide, bf16": replace(wide, objective=IMMConfig(), train=TrainConfig(precision="bf16")),
        "wide, muon": replace(wide, objective=IMMConfig(), optim=OptimConfig(matrices="muon")),
        "wide, flow matching": replace(wide, objective=FlowMatchingConfig()),
        "long rows": replace(wide, objective=IMMConfig(), data=DataConfig(pack=PackConfig(1, 512, 1024))),
        "chain head": replace(wide, joint=JointConfig("chain")),
        "mixture head": replace(wide, joint=JointConfig("mixture", components=4)),
        "added times": replace(wide, model=replace(wide.model, time="add", tied=False)),
    }


def measure(arguments: Arguments) -> list[harness.Row]:
    rows: list[harness.Row] = []
    for seed in range(arguments.seeds):
        for name, config in cases(arguments.quick).items():
            rows.append(
                {"model": name, "seed": seed, **compare(config), **compare_rss(name, arguments.quick)}
            )
    return rows


def compare(config: RunConfig) -> dict[str, float]:
    """Predicted over measured, and both, of operations, of what is kept and of what is saved."""
    torch.manual_seed(0)
    parts = build(config)
    feed = full_feed(config, parts, "dense")
    work = Work.computed(feed.batch, feed.windows)
    flops = step_flops(facts_of(parts), work, parts.objective.needs_target).total
    kept = state_bytes(parts, config)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step(parts, feed, config)
    parts.model.zero_grad(set_to_none=True)
    storages = Storages()
    with torch.autograd.graph.saved_tensors_hooks(storages.add, lambda tensor: tensor):
        weighted(parts, compute_losses(parts, feed, config.train.precision, CPU))
    saved = storages.total(parts.model.parameters())
    said = saved_of(config, parts, work)
    held = Storages()
    optimizer, average = build_optimizer(parts.model, config.optim), Ema(parts.model, 0.9)
    for tensor in (*parts.model.parameters(), *average.state_dict().values()):
        held.add(tensor)
    states = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    step(parts, feed, config)
    gradients = sum(p.grad.nbytes for p in parts.model.parameters() if p.grad is not None)
    measured = held.total() + states + gradients
    return {
        "parameters_M": parts.model.num_parameters() / 1e6,
        "flops_G": flops / 1e9,
        "flops_over_counted": flops / counter.get_total_flops(),
        "kept_MB": kept / 1e6,
        "kept_over_measured": kept / measured,
        "saved_MB": said / 1e6,
        "saved_over_measured": said / saved,
    }


def compare_rss(name: str, quick: bool) -> dict[str, float]:
    """The most that a process of its own held while it trained, and what is said of it."""
    command = [
        sys.executable,
        "-c",
        f"from benchmarks import estimate; estimate.train_alone({name!r}, {quick})",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=harness.ROOT)
    if done.returncode:
        raise ValueError(f"the process that trained {name!r} failed: {done.stderr.strip()[-300:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return {"rss_MB": found["measured"] / 1e6, "rss_said_over_measured": found["said"] / found["measured"]}


def train_alone(name: str, quick: bool) -> None:
    """Trains a few steps in this process and prints, as JSON, what memory grew by and what is said of it."""
    torch.set_num_threads(1)
    config = cases(quick)[name]
    torch.manual_seed(0)
    parts = build(config)
    feed = full_feed(config, parts, "dense")
    said = peak_bytes(config, parts, feed)
    before = _resident("VmRSS") - sum(p.nbytes for p in parts.model.parameters())
    optimizer, average = build_optimizer(parts.model, config.optim), Ema(parts.model, 0.9)
    for number in range(STEPS):
        step(parts, feed, config)
        optimizer.step()
        average.update(parts.model, number)
        optimizer.zero_grad(set_to_none=True)
    print(json.dumps({"measured": _resident("VmHWM") - before, "said": said}))


def step(parts: Parts, feed: Feed, config: RunConfig) -> None:
    weighted(parts, compute_losses(parts, feed, config.train.precision, CPU)).backward()


def facts_of(parts: Parts) -> ModelFacts:
    return ModelFacts.of(parts.model, parts.modalities, parts.objective)


def saved_of(config: RunConfig, parts: Parts, work: Work) -> float:
    particles = parts.objective.particles if parts.objective.needs_target else 0
    precision, facts = config.train.precision, facts_of(parts)
    return saved_bytes(facts, config.data.pack, work, precision, particles=particles, fused_norms=False).total


def state_bytes(parts: Parts, config: RunConfig) -> float:
    """Weights, gradients, optimizer state and one average, as `mmgen estimate` has them."""
    bf16 = replace(config, train=TrainConfig(precision="bf16"))  # weights are float32 in either
    memory = estimate(bf16, Cluster(find_device("h200"))).memory
    return memory.weights + memory.gradients + memory.optimizer + memory.averages


def peak_bytes(config: RunConfig, parts: Parts, feed: Feed) -> float:
    """The estimate's sum for one CPU: no margin, and norms that are not fused."""
    facts, pack, precision = facts_of(parts), config.data.pack, config.train.precision
    work = Work.computed(feed.batch, feed.windows)
    target = target_bytes(facts, pack, precision) if parts.objective.needs_target else 0.0
    return (
        state_bytes(parts, config)
        + saved_of(config, parts, work)
        + mask_pairs(pack)
        + logits_gradient_bytes(facts, work, precision)
        + working_bytes(facts, pack, precision, "none")
        + target
    )


def _resident(field: str) -> int:
    """Bytes of this process by the kernel: VmRSS now, VmHWM at most. (What getrusage calls the most is the parent's,
    where that held more.)
    """
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{field}:"))


if __name__ == "__main__":
    harness.run("estimate", Arguments, measure, __doc__)
