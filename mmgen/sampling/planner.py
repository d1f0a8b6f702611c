"""A planner: of the plans that `mmgen tradeoff` measured, the best one that a budget pays for.

Knows measurements alone, neither models nor pictures. What is best is said by the half of the prompts on which plans
are chosen; what is expected of it by the other half.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmgen.config import from_mapping
from mmgen.sampling.adaptive import Policy
from mmgen.sampling.plan import Plan

UNITS = {"s": ("seconds", 1.0), "ms": ("seconds", 1e-3), "nfe": ("nfe", 1.0), "flop": ("flops", 1.0),
         "mflop": ("flops", 1e6), "gflop": ("flops", 1e9), "tflop": ("flops", 1e12)}  # fmt: skip
SAID_IN = {"seconds": "ms", "nfe": "nfe", "flops": "mflop"}
LOWER_IS_BETTER = {"kid_lite0"}


@dataclass(frozen=True)
class Budget:
    """What one picture may cost at most, in one currency. Raises ValueError where it is not exactly one."""

    flops: float | None = None
    seconds: float | None = None
    nfe: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1 or not min(given.values()) > 0:
            raise ValueError(
                f"a budget is one positive number of flops, seconds or nfe, not {given or 'none'}"
            )

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """From "0.5s", "20ms", "8nfe" or "3gflop". Raises ValueError for anything else."""
        match = re.fullmatch(r"([0-9.]+(?:e[-+]?[0-9]+)?)\s*([a-z]+)", text.strip().lower())
        known = "" if match is None else match[2].replace("flops", "flop")
        if match is None or known not in UNITS:
            raise ValueError(f"budget {text!r}: a number with one of {', '.join(UNITS)}, such as 0.5s")
        name, unit = UNITS[known]
        try:
            return cls(**{name: float(match[1]) * unit})
        except ValueError:
            raise ValueError(f"budget {text!r}: a positive number, such as 0.5s") from None

    @property
    def currency(self) -> str:
        """Which of the three it is."""
        return next(name for name, value in vars(self).items() if value is not None)

    @property
    def amount(self) -> float:
        return getattr(self, self.currency)


@dataclass(frozen=True)
class Choice:
    """A plan or policy, what is expected of it (value, and the ends of its 95 % interval), and what a picture costs; of
    a policy that is a mean over prompts."""

    plan: Plan | Policy
    expected: tuple[float, float, float]
    cost: Mapping[str, float]


class Planner:
    """Chooses among measured plans, and policies, by one figure of `mmgen tradeoff`: KID, or a share of hits."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], figure: str = "kid_lite0") -> None:
        if not rows or figure not in rows[0]["choosing"]:
            known = ", ".join(rows[0]["choosing"]) if rows else "none"
            raise ValueError(f"figure {figure!r} was not measured; there are: {known}")
        self.rows = list(rows)
        self.figure = figure

    @classmethod
    def load(
        cls,
        path: Path,
        figure: str = "kid_lite0",
        adaptive: bool = False,
        of: Mapping[str, str] | None = None,
    ) -> "Planner":
        """From the `tradeoff.json` that `mmgen tradeoff` writes; `adaptive`: policies too, which draw a picture again
        where its score is low. `of`: checkpoint, weights and precision that must be those that were measured.
        Raises ValueError where there is none, and where it was measured of another.
        """
        if not path.is_file():
            raise ValueError(
                f"{path} is missing: `mmgen tradeoff RUN` measures the plans that a budget chooses among"
            )
        record = read_record(path)
        measured = {"precision": "float32", **record}  # what was measured before there was another
        for name, asked in (of or {}).items():
            if measured.get(name) != asked:
                there = measured.get(name)
                raise ValueError(
                    f"{path} was measured of {name} {there}, not {asked}: sample with that, or measure again"
                )
        policies = record.get("policies") or []
        if adaptive and not policies:
            raise ValueError(
                f"{path} has no policies: they need a scorer (`mmgen tradeoff --scorer likelihood`)"
            )
        return cls([*record["rows"], *policies] if adaptive else record["rows"], figure)

    def choose(self, budget: Budget) -> Choice:
        """The best plan that costs no more. Raises ValueError where the cheapest costs more."""
        currency, amount = budget.currency, budget.amount
        within = [row for row in self.rows if row[currency] <= amount * (1 + 1e-9)]  # units are not exact
        if not within:
            cheapest = min(row[currency] for row in self.rows)
            unit = SAID_IN[currency]
            asked, least = f"{amount / UNITS[unit][1]:.9g}", _rounded_up(cheapest / UNITS[unit][1])
            raise ValueError(
                f"budget {asked}{unit} is below the cheapest measured plan, which takes {least}{unit}"
            )
        best = min(within, key=lambda row: (self._loss(row), row[currency]))
        found = best["reported"][self.figure]
        cost = {name: best[name] for name in ("nfe", "flops", "seconds")}
        plan = from_mapping(best["policy"], Policy) if "policy" in best else from_mapping(best["plan"], Plan)
        return Choice(plan, (found["value"], found["low"], found["high"]), cost)

    def _loss(self, row: Mapping[str, Any]) -> float:
        value = row["choosing"][self.figure]["value"]
        return value if self.figure in LOWER_IS_BETTER else -value


def read_record(path: Path) -> dict[str, Any]:
    """What `mmgen tradeoff` wrote, with costs and figures in every row. Raises ValueError where it is not that."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        for kind, rows in (("plan", record["rows"]), ("policy", record.get("policies") or ())):
            for row in rows:
                if not isinstance(row[kind], dict):
                    raise TypeError(f"a {kind} that is none")
                figures = [*row["choosing"].values(), *row["reported"].values()]
                if not all(figure.keys() >= {"value", "low", "high"} for figure in figures):
                    raise KeyError("value, low and high of a figure")
                if not all(isinstance(row[name], int | float) for name in SAID_IN):
                    raise TypeError("a cost that is no number")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is not what `mmgen tradeoff` writes ({why}): measure again") from None
    return record


def _rounded_up(value: float) -> str:
    """To three digits and not below what it is, so that it may be asked for."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return f"{max(value, math.ceil(value / unit - 1e-9) * unit):.12g}"
