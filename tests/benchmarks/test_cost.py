"""The benchmark of predicted seconds: what it calls unseen is, and clocks of known laws give errors that are known."""

from collections.abc import Callable
from itertools import product

import pytest

from benchmarks import cost as benchmark
from benchmarks.cost import _predict, _summary, _unseen
from mmgen.objectives import IMM, IMMConfig
from mmgen.sampling.predict import Work
from mmgen.sampling.probes import Probe, default_probes
from mmgen.sampling.sampler import Sampler
from tests.parts import modalities, model

SIZES = (1, 4, 8)


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    return Sampler(model(), modalities(), IMM(IMMConfig()), (16, 16))


def test_unseen_calls_share_no_plan_batch_or_prompt_with_the_calibration(sampler: Sampler) -> None:
    known, unseen = default_probes(sampler, SIZES), _unseen(sampler, SIZES)
    for one, other in product(known, unseen):
        assert one.plan != other.plan and one.num != other.num
        if other.task != "describe":  # of which a prompt is no part
            assert one.prompt_tokens != other.prompt_tokens


def by_network_calls(work: Work) -> float:
    """A machine on which operations are free."""
    return sum(1e-3 + 4e-3 * call.times for batch in work.batches for call in batch.calls)


def by_operations(work: Work) -> float:
    return 1e-9 * work.cost.flops


def at_random(work: Work) -> float:
    """No law of the plan at all: what cannot be predicted has to show."""
    return 1e-3 * (1 + hash((work.cost.flops, len(work.batches[0].calls), work.batches[0].rows)) % 97)


@pytest.mark.parametrize(
    ("clock", "fits", "flops_fit"),
    [(by_network_calls, True, False), (by_operations, True, True), (at_random, False, False)],
)
def test_errors_are_those_of_the_clock(
    clock: Callable[[Work], float],
    fits: bool,
    flops_fit: bool,
    sampler: Sampler,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def timed(calls, rounds):
        probes: list[Probe] = [call.args[0] for call in calls]
        for call in calls:
            call()
        return [clock(probe.work) for probe in probes]

    monkeypatch.setattr(benchmark, "fastest", timed)
    known, unseen = default_probes(sampler, SIZES), _unseen(sampler, SIZES)[::5]
    rows = _predict(sampler, known, unseen, 1)
    summary = _summary(rows)
    assert summary["unseen"] == len(unseen) and summary["flops_equal"]
    if fits:
        assert summary["worst_error"] < 0.05
    else:
        assert summary["median_error"] > 0.2
    assert (summary["flops_only"] < 1e-3) == flops_fit
