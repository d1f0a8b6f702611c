"""Policies over measured plans: what drawing again where a score is low would have given, and how well planners choose.

Every plan has drawn every prompt, and every picture has its score. So each policy's pictures are there already, and so
are those of every planner. Draws nothing.
"""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from mmgen.evaluation.distances import kid_value
from mmgen.evaluation.frontier import CURRENCIES, pareto_front
from mmgen.evaluation.intervals import Estimate, spread
from mmgen.evaluation.tradeoff import Judge, Measured
from mmgen.rng import keyed_numpy
from mmgen.sampling.adaptive import Policy
from mmgen.sampling.planner import LOWER_IS_BETTER

SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)  # of prompts that are drawn again
SPLITS = 40
BUDGETS = 8


def mixture(first: Measured, then: Measured, threshold: float, scorer: str) -> Measured:
    """What the policy of two plans gives: each prompt's picture, and the mean cost of one, scoring included."""
    assert first.scores is not None and then.scores is not None, "policies go by scores"
    again = first.scores < threshold
    other = again & (then.scores > first.scores)
    share = again.double().mean().item()

    def cost(one: float, two: float) -> float:
        return one + share * two

    return Measured(
        first.plan,
        torch.where(other[:, None], then.features, first.features),
        {name: torch.where(other, then.hits[name], hits) for name, hits in first.hits.items()},
        cost(first.nfe, then.nfe),
        cost(first.flops + first.score_flops, then.flops + then.score_flops),
        cost(first.seconds + first.score_seconds, then.seconds + then.score_seconds),
        max(first.memory, then.memory),
        torch.where(other, then.scores, first.scores),
        policy=Policy(first.plan, then.plan, threshold, scorer),
    )


def mixtures(measured: Sequence[Measured], scorer: str, part: Int[Tensor, "H"]) -> list[Measured]:
    """Every policy of two of the plans, the second one dearer, with thresholds that send some shares of the prompts in
    `part` to it."""
    found = []
    for first, then in product(measured, measured):
        if first.scores is None or then.scores is None or then.flops <= first.flops:
            continue
        thresholds = torch.quantile(first.scores[part].double(), torch.tensor(SHARES, dtype=torch.float64))
        found += [mixture(first, then, threshold, scorer) for threshold in thresholds.tolist()]
    return found


def front(measured: Sequence[Measured], losses: Sequence[float], currency: str) -> list[Measured]:
    """Those that no cheaper one beats, cheap ones first. Policies are made of these: of all plans they would be tens of
    thousands."""
    return [measured[i] for i in pareto_front([getattr(each, currency) for each in measured], losses)]


def loss(measured: Measured, judge: Judge, figure: str, part: Int[Tensor, "H"]) -> float:
    """Of some of the prompts, lower being better."""
    if figure in LOWER_IS_BETTER:
        return kid_value(measured.features[part], judge.features[part])
    return -measured.hits[figure][part].double().mean().item()


def policy_rows(
    judge: Judge, measured: Sequence[Measured], scorer: str, figures: Sequence[str]
) -> list[dict[str, Any]]:
    """The policies that no cheaper one, and no cheaper plan, beats on the half of the prompts on which is chosen, by
    any of the figures in any currency; as rows like those of plans, with figures on both halves."""
    choosing, reporting = judge.halves()
    kept: dict[Policy, Measured] = {}
    for figure in figures:
        losses = [loss(each, judge, figure, choosing) for each in measured]
        for currency in CURRENCIES:
            plans = front(measured, losses, currency)
            every = [*plans, *mixtures(plans, scorer, choosing)]
            known = [loss(each, judge, figure, choosing) for each in every]
            for each in front(every, known, currency):
                if each.policy is not None:
                    kept[each.policy] = each
    rows = []
    for policy, each in kept.items():
        chosen, reported = (judge.figures(each, part) for part in (choosing, reporting))
        cost = {name: getattr(each, name) for name in (*CURRENCIES, "memory")}
        rows.append({**cost, "policy": asdict(policy), "choosing": chosen, "reported": reported})
    return rows


def regrets(
    judge: Judge, measured: Sequence[Measured], scorer: str | None, figure: str, currency: str
) -> dict[str, Estimate]:
    """How far choices fall behind the best plan in hindsight, in the figure's units, over a ladder of budgets.

    Prompts are split into halves at random many times; everything is chosen on the one and judged on the other, by
    which the best plan of each budget, the oracle, is chosen too. `fixed`: the one plan that is best over all budgets
    (the cheapest where it is too dear). `planner`: the best plan of each budget. `adaptive`: the best plan or policy.
    The interval holds 95 % of the splits. A policy may be better than any plan, so its regret may be negative.
    """
    costs = np.array([getattr(each, currency) for each in measured], dtype=np.float64)
    budgets = np.geomspace(costs.min(), costs.max(), BUDGETS)
    found: dict[str, list[float]] = {"fixed": [], "planner": []}
    if scorer is not None:
        found["adaptive"] = []
    for number in range(SPLITS):
        order = torch.from_numpy(keyed_numpy("regret", number).permutation(len(judge.chosen)))
        choosing, judging = order[: len(order) // 2], order[len(order) // 2 :]
        first, second = (
            np.array([loss(each, judge, figure, part) for each in measured]) for part in (choosing, judging)
        )
        cheapest = int(costs.argmin())

        def fixed(index: int, losses: np.ndarray, cheapest: int = cheapest) -> np.ndarray:
            return np.where(costs[index] <= budgets * (1 + 1e-9), losses[index], losses[cheapest])

        one = min(range(len(measured)), key=lambda i: fixed(i, first).mean())
        within = [np.flatnonzero(costs <= budget * (1 + 1e-9)) for budget in budgets]
        oracle = np.array([second[members].min() for members in within])
        chosen = np.array([second[members[first[members].argmin()]] for members in within])
        found["fixed"].append((fixed(one, second) - oracle).mean())
        found["planner"].append((chosen - oracle).mean())
        if scorer is not None:
            policies = mixtures(front(measured, first.tolist(), currency), scorer, choosing)
            known = [loss(each, judge, figure, choosing) for each in policies]
            values = []
            for budget, members in zip(budgets, within, strict=True):
                best = measured[members[first[members].argmin()]]
                least = first[members].min()
                for each, value in zip(policies, known, strict=True):
                    if getattr(each, currency) <= budget and value < least:
                        best, least = each, value
                values.append(loss(best, judge, figure, judging))
            found["adaptive"].append((np.array(values) - oracle).mean())
    return {name: spread(values, len(judge.chosen)) for name, values in found.items()}
