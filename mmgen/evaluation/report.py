"""One HTML page of what `mmgen tradeoff` measured of one run or several. Loads no model and writes nothing.

Everything that is chosen, claimed or said is worked out here and embedded as JSON; the page's own JavaScript only draws
it. The page refers to nothing outside itself, and shows the table of all plans without JavaScript.
"""

import base64
import html
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from mmgen import __version__
from mmgen.evaluation.frontier import CURRENCIES, Features, Row, Surface, axis_value, better, plan_fields
from mmgen.evaluation.tradeoff import FIGURES
from mmgen.evaluation.verdicts import is_share, label, plan_text, show, show_range, value_text, verdicts

PAGE = Path(__file__).with_name("page")
SCRIPTS = ("plot.js", "elements.js", "pictures.js", "tables.js", "page.js")  # the last one starts
ABOUT = {
    "kid_lite0": "Distance of the drawn pictures to the real ones, in features of EfficientNet-Lite0; lower is better.",
    "own_latent": "Share of pictures whose nearest real picture, in latents, is their prompt's own; higher is better.",
    "own_lite0": "Share of pictures whose nearest real picture, in features, is their prompt's own; higher is better.",
    "concept_lite0": "Share of pictures whose nearest real one of another style shows their concept; higher is better.",
    "label_lite0": "Share of pictures that a classifier of real ones calls what their prompt says; higher is better.",
    "copies_lite0": "Share of pictures as near to training as the nearest 5 % of held-out ones are: new pictures score "
    "5 %. Nothing is chosen by it.",
}
TEXT_COLUMNS = {
    "tokens_per_pass": "tokens a pass",
    "temperature": "temperature",
    "source": "text of",
    "kept": "tokens kept a pass",
    "tokens_per_second": "tokens a second",
    "speed": "speed over one a pass",
    "flops_per_token": "FLOPs a token",
    "bits_per_byte": "bits per byte",
}


@dataclass(frozen=True)
class Measurement:
    """What one `mmgen tradeoff` kept: its record, and where they are there the pictures and the hits of its rows."""

    name: str
    record: Mapping[str, Any]
    """of tradeoff.json"""
    pictures: Mapping[int, bytes] = field(default_factory=dict)
    """row -> PNG of its pictures for the record's prompts, side by side"""
    hits: Mapping[tuple[int, str], Sequence[bool]] = field(default_factory=dict)
    """(row, figure) -> of every picture of the reported half, whether it is a hit"""
    features: Mapping[int, Features] = field(default_factory=dict)
    """row, or REAL -> those of the pictures of the reported half"""


def report(measurements: Sequence[Measurement]) -> str:
    """The page. Raises ValueError for a record without plans."""
    if not measurements:
        raise ValueError("a report needs one run or more")
    runs, figures = [], {}
    for each in measurements:
        rows = each.record.get("rows")
        if not rows:
            raise ValueError(f"{each.name}: its tradeoff.json has no plans")
        surface = Surface(rows, each.hits, each.record.get("policies") or (), each.features)
        runs.append(_run(each, surface))
        figures |= dict.fromkeys(surface.figures)
    warnings = incomparable(measurements)
    known = [name for name in FIGURES if name in figures]
    ordered = [*known, *(name for name in figures if name not in known)]
    data = {
        "figures": [_figure(name) for name in sorted(ordered, key=lambda name: better(name) is None)],
        "runs": runs,
        "comparable": not warnings,
    }
    names = ", ".join(each.name for each in measurements)
    parts = {
        "style": _file("page.css"),
        "script": "\n".join(map(_file, SCRIPTS)),
        "title": html.escape(f"What compute buys: {names}"),
        "names": html.escape(names),
        "version": html.escape(__version__),
        "data": _script_json(data),
        "warnings": "".join(f'<p class="warning" role="note">{html.escape(text)}</p>' for text in warnings),
        "about": "".join(_about(each) for each in measurements),
        "table": _plans(measurements, ordered),
        "text": _texts(measurements),
    }
    # in one pass, so that braces in what is put in mean nothing
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _file("page.html"))


def _file(name: str) -> str:
    return (PAGE / name).read_text(encoding="utf-8")


def incomparable(measurements: Sequence[Measurement]) -> list[str]:
    """Sentences that say why figures of these runs must not be compared; none where they may be."""
    found = []
    if len({json.dumps(_identity(each.record), sort_keys=True) for each in measurements}) > 1:
        each_of = "; ".join(f"{each.name}: {_measured_on(each.record)}" for each in measurements)
        found.append(
            "These runs were not measured on the same prompts and real pictures, so a figure of one is neither better "
            f"nor worse than of another. {each_of}."
        )
    return found


def _identity(record: Mapping[str, Any]) -> list[Any]:
    # the floor is of the real pictures, so it tells two sets apart whose prompts are the same
    floor = (record.get("floor") or {}).get("value")
    return [
        record.get("split"), record.get("num"), record.get("prompts"), None if floor is None else f"{floor:.4g}"
    ]  # fmt: skip


def _measured_on(record: Mapping[str, Any]) -> str:
    return f"{record.get('num')} prompts of {record.get('split')}"


def _figure(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": label(name),
        "share": is_share(name),
        "better": better(name),
        "about": ABOUT.get(name, ""),
    }


def _run(each: Measurement, surface: Surface) -> dict[str, Any]:
    """What the page's JavaScript is told of one run."""
    record = each.record
    prompts = [str(prompt) for prompt in record.get("prompts", [])]
    floor = record.get("floor")
    chosen = {figure: None for figure in surface.figures if better(figure) is not None}
    lines = surface.lines()

    def both(make: Any) -> dict[str, dict[str, Any]]:
        return {cost: {figure: make(cost, figure) for figure in chosen} for cost in CURRENCIES}

    return {
        "name": each.name,
        "measured_on": _measured_on(record),
        "prompts": prompts,
        "floor": {"kid_lite0": _interval(floor)} if floor else {},
        "picture": _picture_size(each, len(prompts)),
        "axes": [
            {"name": name, "values": [value_text(v) for v in values]} for name, values in surface.axes.items()
        ],
        "rows": [_row(each, surface, index) for index in range(len(surface.rows))],
        "lines": [
            {"name": line.name, "held": plan_text(line.held), "members": list(line.members)} for line in lines
        ],
        "fronts": both(lambda c, f: {line.name: surface.front(line.members, c, f) for line in lines}),
        "iso": both(lambda c, f: [{"budget": b, "best": best} for b, best in surface.iso(c, f)]),
        "policies": [_policy(surface, row) for row in surface.policies],
        "adaptive": both(lambda c, f: [{"budget": b, "row": row} for b, row in surface.adaptive(c, f)]),
        "planner": both(lambda c, f: [{"budget": b, "row": row} for b, row in surface.planned(c, f)]),
        "verdicts": both(lambda c, f: [asdict(verdict) for verdict in verdicts(surface, c, f)]),
        "gains": {
            axis: {figure: list(_gains(surface, axis, figure)) for figure in surface.figures}
            for axis in surface.varying
        },
    }


def _row(each: Measurement, surface: Surface, index: int) -> dict[str, Any]:
    row = surface.rows[index]
    strip = each.pictures.get(index)
    return {
        "at": surface.at[index],
        "plan": plan_text({name: surface.value(index, name) for name in surface.varying or surface.axes}),
        "cost": {cost: row[cost] for cost in CURRENCIES},
        "reported": {figure: _interval(found) for figure, found in row["reported"].items()},
        "picture": strip and "data:image/png;base64," + base64.b64encode(strip).decode(),
    }


def _policy(surface: Surface, row: Row) -> dict[str, Any]:
    """A policy as the page shows it: both plans by what varies among plans, and its mean cost."""
    policy = row["policy"]
    plans = [
        plan_text({name: axis_value({"plan": policy[which]}, name) for name in surface.varying})
        for which in ("first", "then")
    ]
    return {
        "plan": f"{plans[0]}; where its score is below {policy['threshold']:.3g}: {plans[1]}",
        "cost": {cost: row[cost] for cost in CURRENCIES},
        "reported": {figure: _interval(found) for figure, found in row["reported"].items()},
    }


def _gains(surface: Surface, axis: str, figure: str) -> Iterator[dict[str, Any]]:
    for pair in surface.pairs(axis):
        gain = surface.gain(*pair, figure)
        if gain is not None:
            held = {name: surface.value(gain.before, name) for name in surface.varying if name != axis}
            move = [value_text(surface.value(index, axis)) for index in pair]
            yield {**asdict(gain), "move": move, "held": plan_text(held)}


def _interval(estimate: Row) -> list[float]:
    return [estimate[name] for name in ("value", "low", "high", "num")]


def _picture_size(each: Measurement, count: int) -> list[int] | None:
    """Width and height of one picture. Raises ValueError where a strip is not of the record's prompts."""
    size = None
    for strip in each.pictures.values():
        with Image.open(io.BytesIO(strip)) as image:
            width, height = image.size
        if not count or width % count or (size and size != [width // count, height]):
            raise ValueError(
                f"{each.name}: a strip of {width} x {height} does not show {count} pictures of one size"
            )
        size = [width // count, height]
    return size


def _script_json(data: Any) -> str:
    """JSON that no text in it can end early, whatever HTML it holds."""
    plain = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return plain.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _about(each: Measurement) -> str:
    record = each.record
    fixed = plan_fields(record["rows"])
    facts = {
        "prompts": _measured_on(record),
        "checkpoint": f"{record.get('checkpoint')}, weights {record.get('weights')}",
        "noise": f"seed {record.get('seed')}",
        "plans": f"{len(record['rows'])} measured; the same in all: {plan_text(fixed)}",
    }
    items = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in facts.items()
    )
    return f"<h3>{html.escape(each.name)}</h3><dl class='facts'>{items}</dl>"


def _plans(measurements: Sequence[Measurement], figures: Sequence[str]) -> str:
    """Every plan with its costs and reported figures: what the page shows without JavaScript."""
    made = []
    for each in measurements:
        surface = Surface(each.record["rows"])
        there = [figure for figure in figures if figure in surface.figures]
        names = [*surface.axes, "evaluations", "MFLOP", "ms", *map(label, there)]
        rows = []
        for index, row in enumerate(surface.rows):
            axes = [value_text(surface.value(index, name)) for name in surface.axes]
            cost = [str(row["nfe"]), f"{row['flops'] / 1e6:.4g}", f"{1000 * row['seconds']:.3g}"]
            rows.append([*axes, *cost, *(_cell(figure, row["reported"].get(figure)) for figure in there)])
        floor = each.record.get("floor")
        known = f"; KID of real pictures against real ones: {floor['value']:.3f}" if floor else ""
        caption = f"{each.name}: {_measured_on(each.record)}, costs of one picture{known}"
        made.append(_table(caption, names, rows))
    return "".join(made)


def _texts(measurements: Sequence[Measurement]) -> str:
    """The section on text; nothing where none was measured."""
    made = []
    for each in measurements:
        rows = each.record.get("text") or []
        names = [name for name in TEXT_COLUMNS if any(name in row for row in rows)]
        if rows:
            cells = [[_text_cell(row.get(name)) for name in names] for row in rows]
            made.append(_table(each.name, [TEXT_COLUMNS[name] for name in names], cells))
    if not made:
        return ""
    note = "More tokens a pass are drafted by the joint head and kept where they have the law of one token a pass."
    return f'<section id="texts"><h2>Text</h2><p class="note">{note}</p>{"".join(made)}</section>'


def _text_cell(value: Any) -> str | tuple[str, str]:
    if isinstance(value, Mapping):
        return _number(value["value"]), f"({_number(value['low'])} to {_number(value['high'])})"
    return "–" if value is None else _number(value) if isinstance(value, float) else str(value)


def _number(value: float) -> str:
    """Three digits, or all before the point, and none of them as a power of ten."""
    if abs(value) >= 999.5e3:
        return f"{value / 1e6:.3g} M" if abs(value) < 999.5e6 else f"{value / 1e9:.3g} G"
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}"


def _cell(figure: str, estimate: Row | None) -> str | tuple[str, str]:
    """A value, and its interval, which stands below it."""
    if estimate is None:
        return "–"
    return show(figure, estimate["value"]), show_range(figure, estimate["low"], estimate["high"])


def _table(caption: str, names: Sequence[str], rows: Sequence[Sequence[str | tuple[str, str]]]) -> str:
    def cells(tag: str, texts: Sequence[str | tuple[str, str]], extra: str = "") -> str:
        return "<tr>" + "".join(f"<{tag}{extra}>{content(text)}</{tag}>" for text in texts) + "</tr>"

    def content(text: str | tuple[str, str]) -> str:
        if isinstance(text, str):
            return html.escape(text)
        return f"{html.escape(text[0])} <small>{html.escape(text[1])}</small>"

    body = "".join(cells("td", row) for row in rows)
    head = cells("th", names, ' scope="col"')
    shown = html.escape(caption)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{shown}"><table><caption>{shown}</caption>'
        f"<thead>{head}</thead><tbody>{body}</tbody></table></div>"
    )
