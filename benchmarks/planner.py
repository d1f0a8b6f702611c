"""What a planner is worth: how far its choices fall behind the best plan in hindsight, against one fixed plan.

Reads what `mmgen tradeoff RUN` kept (run that first, over several axes) and draws nothing. Prompts are split into
halves at random many times; plans are chosen on the one and judged on the other, over a ladder of budgets in each
currency. `fixed` is the one plan that is best over all budgets, `planner` the best plan of each, `adaptive` the best
plan or policy (a picture is drawn again, by a dearer plan, where the model's own score of it is low). Regret is in
the figure's units, over the oracle, which knows the judged half; the interval holds 95 % of the splits.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks import harness
from mmgen.evaluation.policies import CURRENCIES, regrets
from mmgen.evaluation.store import SAMPLES, Store
from mmgen.evaluation.tradeoff import Judge, Measured, TradeoffConfig
from mmgen.training.run import load, load_run_config, run_folder

FIGURES = ("kid_lite0", "own_latent", "own_lite0", "concept_lite0", "label_lite0")


@dataclass(frozen=True)
class Arguments(harness.Arguments):
    run: Path = Path("runs/surface")
    """A run that `mmgen tradeoff` has measured."""
    tradeoff: Path | None = None
    """The folder of what was measured; default: tradeoff in the run's."""
    figures: tuple[str, ...] = FIGURES
    """Of which there were measured."""
    currencies: tuple[str, ...] = CURRENCIES
    """In which budgets are."""


def measure(arguments: Arguments) -> list[harness.Row]:
    judge, measured = _measured(arguments)
    figures = [name for name in arguments.figures if name == "kid_lite0" or name in measured[0].hits]
    rows = []
    for figure in figures[:1] if arguments.quick else figures:
        for currency in arguments.currencies[:1] if arguments.quick else arguments.currencies:
            found = regrets(judge, measured, judge.scorer, figure, currency)
            rows.append({"figure": figure, "currency": currency, "plans": len(measured), **found})
    return rows


def _measured(arguments: Arguments) -> tuple[Judge, list[Measured]]:
    """The real side, and every plan that was measured."""
    run = run_folder(arguments.run)
    folder = arguments.tradeoff or run / "tradeoff"
    path = folder / SAMPLES
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: `mmgen tradeoff {arguments.run}` measures the plans to choose among"
        )
    with path.open(encoding="utf-8") as file:
        header = json.loads(file.readline())
    scorer = None if header["scorer"] == "none" else header["scorer"]
    shared = {name: header[name] for name in ("num", "split", "seed", "level")}
    config = TradeoffConfig(scorer=scorer, **shared)
    sampler = load(arguments.run, header["weights"], header.get("precision", "float32"))
    judge = Judge(sampler, load_run_config(run).data.sources, config)
    store = Store(folder, header, [real.key for real in judge.chosen])
    if len(store.found) < 2:
        raise ValueError(f"{path} has {len(store.found)} plans: a choice is among two or more")
    return judge, store.timed(sampler, judge, list(store.found), header["seed"])


if __name__ == "__main__":
    harness.run("planner", Arguments, measure, __doc__)
