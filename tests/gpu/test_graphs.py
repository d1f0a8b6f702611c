"""What a GPU recorded and replays is what it computes call by call."""

import pytest
import torch

from mmgen.sampling import graphs
from mmgen.sampling.plan import Plan
from mmgen.sampling.sampler import Sampler
from tests.sampling.test_graphs import PLANS, check_equal, requests_of, samplers

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("plan", PLANS)
def test_a_gpu_replays_what_it_recorded(plan: Plan):
    records, plain = samplers("cuda")
    for seed in range(graphs.EAGER + 3):
        found, wanted = (each.answer(requests_of(plan), plan, seed) for each in (records, plain))
        check_equal(found.answers, wanted.answers)
    assert records.graphs is not None
    passes = [
        call for places in records.graphs._free.values() for place in places for call in place.calls.values()
    ]
    assert any(call._recorded is not None and call._recorded.graph is not None for call in passes)


def test_in_bfloat16_too():
    wide = samplers("cuda")[0]
    model = wide.model.float()
    model.trunk.narrow_weights()
    records, plain = (
        Sampler(model, wide.modalities, wide.objective, wide.size, precision="bf16", graphs=each)
        for each in (True, False)
    )
    plan = Plan(blocks=2, steps=2, guidance=2.0)
    for seed in range(graphs.EAGER + 3):
        found, wanted = (each.generate(["red square", None], plan, seed).latents for each in (records, plain))
        torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.1)
