"""What the rows of a `tradeoff.json` say: axes, fronts, the best plan of a budget, and what each axis buys.

Choices are made by the figures of the `choosing` half of the prompts, claims by those of the `reported` half. What an
axis is, the rows say: every field of a plan that takes more than one value. Knows neither models nor pictures.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from mmgen.config import from_mapping
from mmgen.evaluation.distances import kid_difference
from mmgen.sampling.adaptive import Policy
from mmgen.sampling.plan import Plan
from mmgen.sampling.planner import LOWER_IS_BETTER, Budget, Planner

Row = Mapping[str, Any]
Features = Float[Tensor, "H F"]

CURRENCIES = ("nfe", "flops", "seconds")
FIRST_AXES = ("blocks", "steps", "guidance")
JOINTLY = "jointly"
REAL = -1  # in place of a row


def better(figure: str) -> str | None:
    """Which values of a figure are better: "lower", "higher", or None where neither is (copies)."""
    if figure.startswith("copies"):
        return None
    return "lower" if figure in LOWER_IS_BETTER else "higher"


@dataclass(frozen=True)
class Line:
    """Rows among which a budget may choose: along one axis, the others at their base; or all of them."""

    name: str
    held: Mapping[str, Any]
    """axis -> value that is the same in all of them"""
    members: Sequence[int]


@dataclass(frozen=True)
class Gain:
    """What going from one plan to another changes in a figure, on the reported half, with a 95 % interval."""

    before: int
    after: int
    change: float
    low: float
    high: float
    verdict: str
    """better or worse, where the interval has no 0 in it; else open"""


class Surface:
    """The rows of one record, by their axes."""

    def __init__(
        self,
        rows: Sequence[Row],
        hits: Mapping[tuple[int, str], Sequence[bool]] | None = None,
        policies: Sequence[Row] = (),
        features: Mapping[int, Features] | None = None,
    ):
        """`hits`: for (row, figure), whether each picture of the reported half is a hit, in one order for all rows.
        `features`: of each row's pictures of that half, and as REAL those of the real ones; of KID."""
        self.rows = list(rows)
        self.policies = list(policies)
        self.hits = hits or {}
        self.features = features or {}
        self.axes = _axes(self.rows)
        self.at = [
            tuple(values.index(axis_value(row, name)) for name, values in self.axes.items())
            for row in self.rows
        ]

    @property
    def figures(self) -> list[str]:
        """Everything that was measured of any row on both halves."""
        found = {name: None for row in self.rows for name in row["reported"] if name in row["choosing"]}
        return list(found)

    @property
    def varying(self) -> list[str]:
        """Axes along which something was measured."""
        return [name for name, values in self.axes.items() if len(values) > 1]

    def value(self, index: int, axis: str) -> Any:
        return axis_value(self.rows[index], axis)

    def base(self, axis: str) -> Any:
        """No guidance, and of other axes the least value."""
        values = self.axes[axis]
        return 1 if axis == "guidance" and 1 in values else values[0]

    def lines(self) -> list[Line]:
        """One for each axis along which something was measured, and one for all together."""
        made = []
        for name in self.varying:
            held = {other: self.base(other) for other in self.varying if other != name}
            members = [
                i for i in range(len(self.rows)) if all(self.value(i, a) == v for a, v in held.items())
            ]
            if len(members) > 1:
                made.append(Line(name, held, members))
        return made if len(self.varying) == 1 else [*made, Line(JOINTLY, {}, range(len(self.rows)))]

    def loss(self, index: int, figure: str, half: str = "choosing") -> float | None:
        """The figure with its sign turned where higher is better; None where it was not measured."""
        found = self.rows[index][half].get(figure)
        return found and (found["value"] if better(figure) == "lower" else -found["value"])

    def front(self, members: Sequence[int], cost: str, figure: str) -> list[int]:
        """Of the members those that no cheaper one beats, cheap ones first."""
        known = [(i, loss) for i in members if (loss := self.loss(i, figure)) is not None]
        places = pareto_front([self.rows[i][cost] for i, _ in known], [loss for _, loss in known])
        return [known[place][0] for place in places]

    def best(self, members: Sequence[int], cost: str, figure: str, budget: float) -> int | None:
        """The best member that costs no more; of equals the cheapest. None where there is none."""
        front = [i for i in self.front(members, cost, figure) if self.rows[i][cost] <= budget]
        return front[-1] if front else None

    def iso(self, cost: str, figure: str) -> list[tuple[float, dict[str, int | None]]]:
        """(budget, the best row of each line) up a ladder of half octaves; rungs that change nothing are left out."""
        found: list[tuple[float, dict[str, int | None]]] = []
        lines = self.lines()
        for budget in self._ladder(cost):
            best = {line.name: self.best(line.members, cost, figure, budget) for line in lines}
            if any(index is not None for index in best.values()) and (not found or best != found[-1][1]):
                found.append((budget, best))
        return found

    def _ladder(self, cost: str) -> list[float]:
        costs = [row[cost] for row in self.rows]
        octaves = math.log2(max(costs) / min(costs))
        exact = [min(costs) * 2 ** (rung / 2) for rung in range(math.ceil(2 * octaves) + 1)]
        # upwards, so that the first rung pays for the cheapest plan and the last for the dearest
        return list(dict.fromkeys(math.ceil(b - 1e-9) if cost == "nfe" else _round_up(b) for b in exact))

    def pairs(self, axis: str) -> Iterator[tuple[int, int]]:
        """Rows that differ along one axis alone: a value and its double (or the next one); guidance and what is no
        number from their base."""
        place = list(self.axes).index(axis)
        groups: dict[tuple[int, ...], dict[int, int]] = {}
        for index, at in enumerate(self.at):
            groups.setdefault(at[:place] + at[place + 1 :], {})[at[place]] = index
        values = self.axes[axis]
        for group in groups.values():
            there = {values[position]: index for position, index in sorted(group.items())}
            for value, after in _steps_of(axis, there, self.base(axis)):
                yield there[value], there[after]

    def gain(self, before: int, after: int, figure: str) -> Gain | None:
        """None where the figure is not known of both."""
        if any(figure not in self.rows[i]["reported"] for i in (before, after)):
            return None
        change, low, high = self._change(before, after, figure)
        turned = -1 if better(figure) == "lower" else 1
        ends = sorted((turned * low, turned * high))
        verdict = "better" if ends[0] > 0 else "worse" if ends[1] < 0 else "open"
        return Gain(before, after, change, low, high, verdict)

    def _change(self, before: int, after: int, figure: str) -> tuple[float, float, float]:
        """after - before, and the ends of its interval; of the same prompts where they are known one by one."""
        if figure == "kid_lite0" and {before, after, REAL} <= self.features.keys():
            drawn, other, real = (self.features[index] for index in (after, before, REAL))
            found = kid_difference(drawn, other, real, ("gain", before, after))
            return found.value, found.low, found.high
        one, other = (self.rows[index]["reported"][figure] for index in (before, after))
        return difference(one, other, self._correlation(before, after, figure))

    def _correlation(self, before: int, after: int, figure: str) -> float:
        one, other = (np.asarray(self.hits.get((i, figure), ()), float) for i in (before, after))
        if not len(one) or len(one) != len(other) or not one.std() or not other.std():
            return 0.0
        return float(np.corrcoef(one, other)[0, 1])

    def planned(self, cost: str, figure: str) -> list[tuple[float, int]]:
        """(budget from which on the planner chooses it, row)."""
        known = [
            i for i, row in enumerate(self.rows) if figure in row["choosing"] and figure in row["reported"]
        ]
        plans = {from_mapping(dict(self.rows[i]["plan"]), Plan): i for i in known}
        planner = Planner([self.rows[i] for i in known], figure)
        found: list[tuple[float, int]] = []
        for amount in sorted({self.rows[i][cost] for i in known}):
            plan = planner.choose(Budget(**{cost: amount})).plan
            assert isinstance(plan, Plan), "these rows are of plans"
            index = plans[plan]
            if not found or found[-1][1] != index:
                found.append((amount, index))
        return found

    def adaptive(self, cost: str, figure: str) -> list[tuple[float, int | None]]:
        """(budget from which on a planner that may take policies chooses it, policy; None where it takes a plan)."""
        both = [row for row in (*self.rows, *self.policies) if figure in row["choosing"]]
        if not self.policies or not both:
            return []
        policies = [from_mapping(dict(row["policy"]), Policy) for row in self.policies]
        planner, found = Planner(both, figure), []
        for amount in sorted({row[cost] for row in both}):
            plan = planner.choose(Budget(**{cost: amount})).plan
            index = policies.index(plan) if isinstance(plan, Policy) else None
            if not found or found[-1][1] != index:
                found.append((amount, index))
        return found


def pareto_front(costs: Sequence[float], losses: Sequence[float]) -> list[int]:
    """Those that nothing cheaper, and nothing as cheap, beats; cheap ones first."""
    found: list[int] = []
    least = math.inf
    for index in sorted(range(len(costs)), key=lambda i: (costs[i], losses[i])):
        if losses[index] < least:
            least = losses[index]
            found.append(index)
    return found


def difference(before: Row, after: Row, correlation: float = 0.0) -> tuple[float, float, float]:
    """after - before of two estimates, and the ends of its 95 % interval, by the method of variance estimates recovery
    (Zou and Donner 2008; of two shares of the same items it is Newcombe's tenth, 1998)."""
    change = after["value"] - before["value"]
    below, above = after["value"] - after["low"], after["high"] - after["value"]
    own_below, own_above = before["value"] - before["low"], before["high"] - before["value"]

    def width(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * correlation * a * b + b * b))

    return change, change - width(below, own_above), change + width(above, own_below)


def axis_value(row: Row, axis: str) -> Any:
    """A plan's value along an axis; steps that are the same in every block are one number."""
    value = row["plan"].get(axis)
    if not isinstance(value, (list, tuple)):
        return value
    return value[0] if axis == "steps" and len(set(value)) == 1 else tuple(value)


def plan_fields(rows: Sequence[Row]) -> dict[str, Any]:
    """What is the same in the plans of all rows."""
    return {
        name: value
        for name, value in rows[0]["plan"].items()
        if all(row["plan"].get(name) == value for row in rows)
    }


def _axes(rows: Sequence[Row]) -> dict[str, list[Any]]:
    names = dict.fromkeys([*FIRST_AXES, *(name for row in rows for name in row["plan"])])
    axes = {name: sorted({axis_value(row, name) for row in rows}, key=_order) for name in names}
    # a page without blocks and steps would leave a reader asking
    return {name: values for name, values in axes.items() if len(values) > 1 or name in FIRST_AXES[:2]}


def _order(value: Any) -> tuple[int, float, str]:
    if isinstance(value, (int, float)):
        return 0, float(value), ""
    if isinstance(value, tuple) and all(isinstance(each, (int, float)) for each in value):
        return 1, float(sum(value)), json.dumps(value)
    return 2, 0.0, str(value)


def _steps_of(axis: str, values: Mapping[Any, int], base: Any) -> Iterator[tuple[Any, Any]]:
    numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
    if axis != "guidance":
        for place, value in enumerate(numbers[:-1]):
            yield value, 2 * value if value and 2 * value in values else numbers[place + 1]
    if base in values:
        others = values if axis == "guidance" else [v for v in values if v not in numbers]
        yield from ((base, value) for value in others if value != base)


def _round_up(value: float) -> float:
    """To two digits, never below the value but for what floating point loses."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / unit - 1e-9) * unit:.12g}")
