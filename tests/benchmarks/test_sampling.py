"""The benchmark of sampling: without a cache the same is drawn and written, by as many operations more as it says."""

from collections.abc import Callable

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.sampling import recomputing_ratio, without_cache
from mmgen.model.joint import JointConfig
from mmgen.objectives import IMM, IMMConfig
from mmgen.sampling.plan import Plan
from mmgen.sampling.probes import Probe
from mmgen.sampling.sampler import Result, Sampler
from tests.parts import modalities, model


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    joint = JointConfig("chain", 3)
    return Sampler(model(joint=joint).double(), modalities(), IMM(IMMConfig()), (16, 16))


def operations(call: Callable[[], Result]) -> tuple[Result, int]:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        result = call()
    return result, counter.get_total_flops()


@pytest.mark.parametrize(
    ("task", "plan"),
    [
        ("generate", Plan(steps=3)),
        ("generate", Plan(steps=1)),
        ("generate", Plan(blocks=2, steps=2, guidance=2.0)),
        ("complete", Plan(max_tokens=6)),
    ],
)
def test_nothing_but_the_operations_changes(task, plan: Plan, sampler: Sampler) -> None:
    probe = Probe(sampler, task, plan, num=3)
    cached, few = operations(probe.run)
    with without_cache():
        again, many = operations(probe.run)
    assert again.text == cached.text
    if cached.latents is not None and again.latents is not None:
        torch.testing.assert_close(again.latents, cached.latents, rtol=0, atol=1e-9)
    ratio = recomputing_ratio(probe.work)
    assert many / few == pytest.approx(ratio, rel=1e-6) and ratio > 1.2
    assert operations(probe.run)[1] == few, "afterwards there is a cache again"


def test_what_was_taken_back_is_forgotten(sampler: Sampler) -> None:
    """Drafted tokens that are refused leave spans to be cut."""
    probe = Probe(sampler, "complete", Plan(max_tokens=12, tokens_per_pass=3), num=4)
    cached = probe.run()
    assert cached.cost.tokens < 3 * cached.cost.passes, "some are refused"
    with without_cache():
        assert probe.run().text == cached.text
