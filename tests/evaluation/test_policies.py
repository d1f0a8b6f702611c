"""Policies over measured plans, and the regret of planners, where everything is known."""

from typing import cast

import pytest
import torch

from mmgen.evaluation.policies import loss, mixture, mixtures, policy_rows, regrets
from mmgen.evaluation.tradeoff import Judge, Measured, surface
from mmgen.rng import keyed_torch
from mmgen.sampling.plan import Plan

NUM = 200


class Known(Judge):
    """The real side with features that are noise; halves and figures are the real ones'."""

    def __init__(self) -> None:
        self.chosen = cast(list, list(range(NUM)))
        self.features = torch.randn(NUM, 4, generator=keyed_torch("known"))


def measured(steps: int, hits: torch.Tensor, scores: torch.Tensor | None = None) -> Measured:
    return Measured(
        Plan(steps=steps),
        torch.full((NUM, 4), float(steps)),
        {"own_latent": hits},
        nfe=steps,
        flops=float(steps),
        seconds=0.1 * steps,
        scores=scores,
        score_flops=0.25,
        score_seconds=0.01,
    )


def uniform(*key: str) -> torch.Tensor:
    return torch.rand(NUM, generator=keyed_torch(*key))


def test_a_policy_draws_again_where_the_score_is_low_and_keeps_what_scores_higher():
    low, high = torch.arange(NUM) < 50, torch.arange(NUM) < 20
    scores = torch.where(low, 0.2, 0.8)
    first = measured(1, ~low, scores)
    # of those drawn again twenty score worse than before
    then = measured(4, torch.ones(NUM, dtype=torch.bool), torch.where(high, 0.1, 0.5))
    mixed = mixture(first, then, 0.3, "likelihood")
    assert mixed.hits["own_latent"].tolist() == (~high).tolist()
    assert mixed.features[:, 0].tolist() == [4.0 if 20 <= i < 50 else 1.0 for i in range(NUM)]
    assert mixed.nfe == 1 + 0.25 * 4 and mixed.flops == pytest.approx(1.25 + 0.25 * 4.25)
    assert mixed.policy is not None and (mixed.policy.first.steps, mixed.policy.then.steps) == (1, 4)
    everything = torch.arange(NUM)
    assert loss(mixed, Known(), "own_latent", everything) == -0.9
    assert len(mixtures([first, then], "likelihood", everything)) == 5
    assert mixtures([first, measured(4, ~low)], "likelihood", everything) == [], "no score, no policy"


def plans(scores_say_it: bool) -> list[Measured]:
    """Of 1, 2 and 4 steps, right for 50, 60 and 70 % of the prompts."""
    found = []
    for steps, share in ((1, 0.5), (2, 0.6), (4, 0.7)):
        hits = uniform("hits", str(steps)) < share
        scores = hits.float() if scores_say_it else uniform("scores", str(steps))
        found.append(measured(steps, hits, scores + 0.1 * uniform("tie", str(steps))))
    return found


def test_a_planner_regrets_little_and_scores_that_say_what_is_right_help_it():
    found = regrets(Known(), plans(True), "likelihood", "own_latent", "nfe")
    assert found["fixed"].value > found["planner"].value >= 0
    assert found["adaptive"].value < found["planner"].value - 0.05
    blind = regrets(Known(), plans(False), "likelihood", "own_latent", "nfe")
    assert blind["adaptive"].value > found["adaptive"].value + 0.05, "the control: scores that say nothing"
    assert set(regrets(Known(), plans(True), None, "own_latent", "nfe")) == {"fixed", "planner"}


def test_rows_of_policies_are_those_that_nothing_cheaper_beats():
    judge = Known()
    rows = policy_rows(judge, plans(True), "likelihood", ["own_latent"])
    assert rows and all(row["policy"]["first"]["steps"] < row["policy"]["then"]["steps"] for row in rows)
    assert all(
        set(row) == {"policy", "nfe", "flops", "seconds", "memory", "choosing", "reported"} for row in rows
    )
    best = max(row["choosing"]["own_latent"].value for row in rows)
    choosing, _ = judge.halves()
    assert best > max(-loss(each, judge, "own_latent", choosing) for each in plans(True))
    assert len(rows) < len(mixtures(plans(True), "likelihood", choosing))


def test_a_planner_that_chooses_among_plans_that_are_alike_regrets_what_hindsight_sees():
    """Thirty plans that are right at random: what looks best on one half of the prompts is not so on the other."""
    alike = [measured(1 + number, uniform("alike", str(number)) < 0.5) for number in range(30)]
    found = regrets(Known(), alike, None, "own_latent", "nfe")
    assert found["planner"].value > 0.05


def test_thresholds_of_policies_are_those_of_the_half_on_which_is_chosen():
    """On the other half all scores are higher by ten."""
    judge = Known()
    _, reporting = judge.halves()
    right = plans(True)
    for each in right:
        assert each.scores is not None
        each.scores[reporting] += 10
    rows = policy_rows(judge, right, "likelihood", ["own_latent"])
    assert rows and all(row["policy"]["threshold"] < 5 for row in rows)


def test_guidance_is_chosen_on_the_one_half_and_reported_on_the_other():
    """One guidance draws the real pictures of the half on which is chosen, the other those of the other half."""
    judge = Known()
    choosing, reporting = judge.halves()
    found = []
    for guidance, right, wrong in ((1.0, choosing, reporting), (3.0, reporting, choosing)):
        features = judge.features.clone()
        features[wrong] += 5
        plan = Plan(steps=1, guidance=guidance)
        hits = torch.zeros(NUM, dtype=torch.bool)
        hits[right] = True
        found.append(Measured(plan, features, {"own_latent": hits}, nfe=1, flops=1.0, seconds=1.0))
    rows = surface(judge, found)
    (chosen,) = [row for row in rows if row["chosen"]]
    assert chosen["guidance"] == 1 and chosen["choosing"]["own_latent"].value == 1
    assert chosen["reported"]["own_latent"].value == 0, (
        "and what is reported is of the other half, whatever it is"
    )
