"""Latencies: every plan once a round, the first rounds not counted, the median of the others."""

from types import SimpleNamespace

import pytest
import torch

from mmgen.evaluation import latency
from mmgen.sampling.plan import Plan


def test_plans_are_timed_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that is stood still but for the drawing: a second a step, and one round in which all is slow."""
    now, drawn = [0.0], []

    def generate(prompts, plan, seed):
        number = len(drawn) // len(plans)
        drawn.append((prompts, plan))
        now[0] += plan.steps * (100 if number in (0, latency.WARMUP + 1) else 1)
        return SimpleNamespace(latents=torch.zeros(1))

    def score(sampler, scorer, requests, latents, cost):
        now[0] += 0.25

    plans = [Plan(steps=steps) for steps in (1, 2, 4)]
    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(latency, "score_pictures", score)
    sampler = SimpleNamespace(generate=generate)
    found = latency.measure_latencies(sampler, ["a", "b"], plans, 0, "likelihood")  # pyright: ignore[reportArgumentType]
    assert found.plans == {plan: float(plan.steps) for plan in plans} and found.scoring == 0.25
    rounds = [drawn[i : i + 3] for i in range(0, len(drawn), 3)]
    assert len(rounds) == latency.WARMUP + latency.ROUNDS
    assert all({plan for _, plan in each} == set(plans) for each in rounds)
    assert len({tuple(plan.steps for _, plan in each) for each in rounds}) > 1, "orders of their own"
    assert [each[0][0] for each in rounds] == [["a"], ["b"]] * 4
