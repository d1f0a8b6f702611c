"""Calls over caches of fixed size, which a GPU records: the same answers, from request to request."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmgen.model.joint import JointConfig
from mmgen.objectives import IMM, IMMConfig
from mmgen.sampling import graphs
from mmgen.sampling.plan import Plan
from mmgen.sampling.request import Answer, Request
from mmgen.sampling.sampler import Sampler
from tests.parts import TINY, modalities, model, picture

REQUESTS = [
    Request(("red square",)),
    Request(("a large blue circle on the white",)),
    Request((picture(0),), ("text",)),
    Request((), ("image", "image")),
    Request(("the small", picture(2), "on the white"), ("text", "image", "text")),
    Request(("a red", picture(1)), ("image",), (8, 24)),
]
PLANS = [
    Plan(steps=3, max_tokens=9),
    Plan(blocks=2, steps=(2, 1), guidance=2.0, thinking=5, max_tokens=7, tokens_per_pass=3),
    Plan(steps=2, guidance=1.5, picture_guidance=3.0, max_tokens=3, guidance_range=(0.4, 1.0)),
    Plan(blocks=2, steps=3, guidance=2.5, solver="restart", candidates=2, max_tokens=3),
    Plan(steps=1, max_tokens=9, tokens_per_pass=4, verify=False),
]


def samplers(device: str = "cpu") -> tuple[Sampler, Sampler]:
    """One that records, and one that does not."""
    net = model(TINY, dtype=torch.float64, joint=JointConfig("chain", tokens=4, rank=8)).to(device)
    with_graphs, without = (
        Sampler(net, modalities(), IMM(IMMConfig()), (16, 16), graphs=each) for each in (True, False)
    )
    return with_graphs, without


def requests_of(plan: Plan) -> list[Request]:
    """Candidates are of pictures alone, whose texts are then likely or not."""
    judged = [each for each in REQUESTS if "image" in each.asked and {str} & set(map(type, each.given))]
    return REQUESTS if plan.candidates == 1 else judged


def check_equal(one: list[Answer], other: list[Answer]) -> None:
    for mine, others in zip(one, other, strict=True):
        assert [p for p in mine.parts if isinstance(p, str)] == [
            p for p in others.parts if isinstance(p, str)
        ]
        assert mine.thoughts == others.thoughts
        for ours, theirs in zip(mine.latents, others.latents, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("plan", PLANS)
def test_answers_are_those_of_a_sampler_that_records_nothing(plan: Plan):
    records, plain = samplers()
    for seed in (3, 4, 5):  # what was left of the requests before is not seen
        found, wanted = (each.answer(requests_of(plan), plan, seed) for each in (records, plain))
        check_equal(found.answers, wanted.answers)
        assert replace(found.cost, seconds=0, memory=0) == replace(wanted.cost, seconds=0, memory=0)


def test_requests_alike_take_the_same_caches_and_calls(monkeypatch: pytest.MonkeyPatch):
    records, _ = samplers()
    made = []
    init = graphs.Recorded.__init__

    def counted(self: graphs.Recorded, *arguments) -> None:
        made.append(self)
        init(self, *arguments)

    monkeypatch.setattr(graphs.Recorded, "__init__", counted)
    plan = Plan(blocks=2, steps=2, guidance=2.0, max_tokens=5)
    requests = [Request(("red",), ("text", "image"))]
    records.answer(requests, plan, seed=1)
    # a pass over text; a block has other sizes than the block before, and both are drawn guided
    assert len(made) == 3
    for seed in (2, 3):
        records.answer([Request(("blue",), ("text", "image"))], plan, seed)
    assert len(made) == 3


def test_caches_that_nobody_asks_for_any_more_are_dropped():
    records, plain = samplers()
    plan = Plan(max_tokens=2)
    for num in range(1, graphs.KEPT + 5):
        requests = [Request(("red",), ("text",))] * num
        check_equal(records.answer(requests, plan).answers, plain.answer(requests, plan).answers)
    assert records.graphs is not None
    kept = [rows for rows, _, _ in records.graphs._free]
    assert kept == list(range(5, graphs.KEPT + 5))


def test_a_request_that_fails_gives_its_caches_back():
    records, plain = samplers()

    def fail(_) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        records.answer(REQUESTS[:1], PLANS[0], listen=fail)
    assert records.graphs is not None and not records.graphs._taken
    check_equal(records.answer(REQUESTS[:1]).answers, plain.answer(REQUESTS[:1]).answers)


class NoHost(TorchDispatchMode):
    """Refuses what a stream that is being captured refuses: numbers that come from the host, or go there."""

    REFUSED = ("lift_fresh", "_local_scalar_dense", "nonzero", "item", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        assert name not in self.REFUSED, f"a graph cannot hold {name}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("plan", PLANS[:3])
def test_nothing_that_is_recorded_asks_the_host(plan: Plan, monkeypatch: pytest.MonkeyPatch):
    records, _ = samplers()
    run, num_runs = graphs.Recorded._run, []

    def watched(self: graphs.Recorded):
        num_runs.append(self)
        with NoHost():
            return run(self)

    monkeypatch.setattr(graphs.Recorded, "_run", watched)
    records.answer(REQUESTS, plan)
    assert num_runs
