"""What each axis of a surface buys, in words made from the numbers: for people who read no plots."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmgen.evaluation.frontier import JOINTLY, Gain, Surface, better
from mmgen.evaluation.tradeoff import FIGURES

WORDS = {"nfe": "network evaluations", "flops": "FLOPs", "seconds": "seconds"}


@dataclass(frozen=True)
class Verdict:
    axis: str
    kind: str
    """pays, part, elsewhere, open or no"""
    title: str
    text: str


def is_share(figure: str) -> bool:
    """Whether a figure is a share of hits; everything else is a distance or a score."""
    return figure.startswith(("own_", "concept_", "label_", "copies_"))


def label(figure: str) -> str:
    return FIGURES.get(figure, figure.replace("_", " "))


def show(figure: str, value: float, signed: bool = False) -> str:
    """A value as people read it: shares in %, their differences in points."""
    unit = "" if not is_share(figure) else " points" if signed else " %"
    digits = 1 if unit else 3 if abs(value) < 10 else 1
    text = f"{100 * value if unit else value:{'+' if signed else ''}.{digits}f}{unit}"
    return text.replace("-", "−")


def show_range(figure: str, low: float, high: float, signed: bool = False) -> str:
    """The ends of an interval, without the unit."""
    ends = (show(figure, end, signed).removesuffix(" points").removesuffix(" %") for end in (low, high))
    return f"({' to '.join(ends)})"


def value_text(value: Any) -> str:
    """A value of an axis: numbers without trailing zeros, one number a block as a sum."""
    if isinstance(value, tuple):
        return "+".join(map(value_text, value))
    return f"{value:g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


def plan_text(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value_text(value)}" for name, value in values.items())


def verdicts(surface: Surface, cost: str, figure: str) -> list[Verdict]:
    """One for each axis along which the figure was measured. Empty for a figure that has no better and worse."""
    if better(figure) is None:
        return []
    made = (_verdict(surface, axis, cost, figure) for axis in surface.varying)
    return [verdict for verdict in made if verdict is not None]


def _verdict(surface: Surface, axis: str, cost: str, figure: str) -> Verdict | None:
    found = (surface.gain(*pair, figure) for pair in surface.pairs(axis))
    gains = [gain for gain in found if gain is not None]
    if not gains:
        return None
    counts = Counter(gain.verdict for gain in gains)
    equal = Counter(gain.verdict for gain in _at_equal_compute(surface, axis, cost, figure))
    up, down = counts["better"], counts["worse"]
    if down >= up and _beyond_chance(down, len(gains)):
        kind = "no"
    elif not _beyond_chance(up, len(gains)):
        kind = "open"
    elif equal["worse"] and not equal["better"]:
        kind = "elsewhere"
    else:
        kind = "pays" if not down and 2 * up >= len(gains) else "part"
    total = _many(len(gains), "comparison")
    tally = f"better in {up or 'none'} of {total}" + (f", worse in {down}" if down else "")
    title = {
        "pays": f"pays: {tally}",
        "part": f"pays in part: {tally}",
        "elsewhere": f"helps ({tally}), but the same {WORDS[cost]} bought more elsewhere",
        "open": "was not shown to pay: "
        + (f"{tally}, as by chance" if up or down else f"no gain in {total}"),
        "no": f"{_hurts(up, down)}: {tally}",
    }[kind]
    sentences = [_counted(surface, axis, figure, gains), _best_looking(surface, axis, cost, figure, gains)]
    if equal:
        sentences.append(
            f"At equal {WORDS[cost]}, where {axis} alone and the best other axis alone bought different plans, {axis} "
            f"did better in {equal['better']} of {_many(equal.total(), 'case')} and worse in {equal['worse']}."
        )
    return Verdict(axis, kind, f"Spending on {axis} {title}", " ".join(sentences))


def _hurts(up: int, down: int) -> str:
    if not up:
        return "does not pay"
    return "hurts as often as it helps" if down == up else "hurts more often than it helps"


def _beyond_chance(count: int, total: int) -> bool:
    """Whether so many comparisons have an interval on one side of 0 that chance, which puts one of forty there, would
    rarely make as many (one time in twenty; as if they were independent)."""
    tail = sum(math.comb(total, n) * 0.025**n * 0.975 ** (total - n) for n in range(count, total + 1))
    return count > 0 and tail < 0.05


def _counted(surface: Surface, axis: str, figure: str, gains: Sequence[Gain]) -> str:
    def where(verdict: str) -> str:
        moves = dict.fromkeys(_move(surface, axis, gain) for gain in gains if gain.verdict == verdict)
        return f" ({', '.join(moves)})" if moves else ""

    counts = Counter(gain.verdict for gain in gains)
    return (
        f"All else equal, {label(figure)} got better in {counts['better']} of {_many(len(gains), 'comparison')}"
        f"{where('better')} and worse in {counts['worse']}{where('worse')}; in {counts['open']} no difference was "
        "shown."
    )


def _best_looking(surface: Surface, axis: str, cost: str, figure: str, gains: Sequence[Gain]) -> str:
    """What looked best on the choosing half, as the other half has it."""

    def promised(gain: Gain) -> float:
        before, after = (surface.loss(i, figure) for i in (gain.before, gain.after))
        return float("-inf") if before is None or after is None else before - after

    gain = max(gains, key=promised)
    rows = surface.rows[gain.before], surface.rows[gain.after]
    held = {name: surface.value(gain.before, name) for name in surface.varying if name != axis}
    at = f" at {plan_text(held)}" if held else ""
    low, high = sorted((gain.low, gain.high))
    return (
        f"What looked best on the choosing half, {_move(surface, axis, gain)}{at}, changed it on the reported half by "
        f"{show(figure, gain.change, signed=True)} {show_range(figure, low, high, signed=True)}, for "
        f"{rows[1][cost] / rows[0][cost]:.3g} times the {WORDS[cost]}."
    )


def _many(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _move(surface: Surface, axis: str, gain: Gain) -> str:
    return " → ".join(value_text(surface.value(i, axis)) for i in (gain.before, gain.after))


def _at_equal_compute(surface: Surface, axis: str, cost: str, figure: str) -> Iterable[Gain]:
    """The best plan along this axis against the best along any other, at every budget that changes one of them."""

    def differing() -> Iterator[tuple[int, int]]:
        for budget, best in surface.iso(cost, figure):
            own = best.get(axis)
            others = [i for name, i in best.items() if name not in (axis, JOINTLY) and i is not None]
            other = surface.best(others, cost, figure, budget)
            if own is not None and other is not None and own != other:
                yield other, own

    found = (surface.gain(*pair, figure) for pair in dict.fromkeys(differing()))
    return [gain for gain in found if gain is not None]
