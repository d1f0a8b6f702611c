"""A compiled block: the same numbers, one compilation for all layers, and none after the first batches."""

from collections.abc import Callable

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from mmgen.data.pack import PackConfig, Packer
from mmgen.model.trunk import Checkpointing
from mmgen.objectives import IMM, FlowMatching, FlowMatchingConfig, IMMConfig, Objective
from mmgen.objectives.draw import draw_state
from mmgen.training.feed import Feed
from mmgen.training.losses import compute_losses, weighted
from mmgen.training.run import Parts
from tests.parts import documents, modalities, model, tokenizer

CPU = torch.device("cpu")


class Counter:
    """Compiles what runs forward and backward as it is, and counts how often it is asked to."""

    def __init__(self) -> None:
        self.count = 0
        self._compile = aot_autograd(fw_compiler=self._keep, bw_compiler=self._keep)

    def _keep(self, graph: torch.fx.GraphModule, _: object) -> Callable:
        return make_boxed_func(graph.forward)

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        self.count += 1
        return self._compile(graph, inputs)


@pytest.fixture(autouse=True)
def _forget():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def feed(objective: Objective, num_documents: int) -> Feed:
    """One batch of fixed shape; how many noisy copies are in it varies."""
    packer = Packer(PackConfig(2, 384, 384), modalities(), objective.grouping)
    assert packer.add(*documents(num_documents), *documents(4, "image text"))
    batch = packer.finish()
    return Feed(batch, draw_state(batch, modalities(), objective, 0), None)


def gradients(parts: Parts, each: Feed, precision: str) -> list[torch.Tensor]:
    loss = weighted(parts, compute_losses(parts, each, precision, CPU))
    loss.backward()
    found = [p.grad.clone() for p in parts.model.parameters() if p.grad is not None]
    parts.model.zero_grad(set_to_none=True)
    return [loss.detach(), *found]


@pytest.mark.parametrize("objective", [IMM(IMMConfig(k=4.0)), FlowMatching(FlowMatchingConfig())])
@pytest.mark.parametrize(
    ("precision", "checkpointing"),
    [("float64", "none"), ("float64", "selective"), ("float64", "full"), ("bf16", "none")],
)
def test_gradients_are_the_same_and_batches_compile_nothing_anew(
    objective: Objective, precision: str, checkpointing: Checkpointing
):
    dtype = torch.float64 if precision == "float64" else torch.float32
    parts = Parts(tokenizer(), modalities(), model(dtype=dtype), objective)
    batches = [feed(objective, num) for num in (8, 4, 12, 16)]
    plain = [gradients(parts, each, precision) for each in batches]
    counter = Counter()
    parts.model.trunk.checkpoint_blocks(checkpointing)
    parts.model.trunk.compile_blocks(counter)
    counts = []
    for each, expected in zip(batches, plain, strict=True):
        found = gradients(parts, each, precision)
        counts.append(counter.count)
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            if precision == "float64":
                torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
            else:
                assert (one - other).norm() <= 0.02 * other.norm()
    assert counts[0] == 1, "one compilation, whatever the number of layers"
    assert counts[1:] == [2, 2, 2], "another number of instances makes that number a variable, once"


def test_names_of_weights_stay_as_they_are():
    net = model()
    names = list(net.state_dict())
    net.trunk.compile_blocks("eager")
    assert list(net.state_dict()) == names
