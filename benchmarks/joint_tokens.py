"""What heads over the next k tokens can say of their joint law: the second demonstration of arXiv 2503.07154.

J1: k softmaxes deal poker hands that do not exist; a mixture needs a component for each hand, a chain needs none. J2:
for bits of even parity a mixture needs twice the components for every further bit, a hidden Markov head four states
for any number of bits. J3: verification leaves the right law whatever the head; a better head saves passes.
docs/joint_tokens.md has the argument, benchmarks/joint_fits.py the laws and the fits.

The value of a row is, for J1 and J2, the excess of the head's loss over the law's entropy in bits, beside the
probability of all strings of the law together; for J3 the expected number of tokens that a pass of the trunk commits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from benchmarks import harness
from benchmarks.joint_fits import (
    FIRST_WORDS,
    HANDS,
    SECOND_WORDS,
    Case,
    InOneContext,
    even_parity,
    excess_bits,
    fit,
    pair_probabilities,
    parity_by_hand,
    real_mass,
    tokens_per_pass,
)
from mmgen.model.joint import JointKind

MOST_BITS = 5
BITS_BY_HAND = 12
BY_HAND = "hidden Markov, 4 states, set by hand"
VERIFIED = (HANDS.name, even_parity(4).name)

SHORT = {
    "independent": "indep.",
    **{f"mixture, {r} components": f"mix {r}" for r in (2, 3, 4, 8, 16)},
    "hidden Markov, 4 states": "HMM 4",
    "chain": "chain",
}

Fits = Mapping[tuple[str, str], Sequence[InOneContext]]
"""(case, head) -> one for each seed"""
Values = Mapping[tuple[str, str, str], float]
"""(claim, case, head) -> the mean over seeds"""


@dataclass(frozen=True)
class Arguments(harness.Arguments):
    restarts: int = 48
    """Random beginnings of each fit, of which the best counts."""
    steps: int = 400
    """Steps of gradient descent from each."""
    picture: Path | None = None
    """Where the figure goes; none is drawn where it is not given."""


def heads(case: Case) -> dict[str, tuple[JointKind, int]]:
    """Kind and number of components by name, of the heads that a case is fitted by."""
    counts = (2, 3, 4) if case is HANDS else (2, 4, 8, 16)
    found: dict[str, tuple[JointKind, int]] = {"independent": ("independent", 1)}
    for r in counts:
        if r <= len(case.strings):
            found[f"mixture, {r} components"] = ("mixture", r)
    return {**found, "hidden Markov, 4 states": ("hmm", 4), "chain": ("chain", 1)}


def measure(arguments: Arguments) -> list[harness.Row]:
    restarts, steps = (4, 100) if arguments.quick else (arguments.restarts, arguments.steps)
    cases = [HANDS, *(even_parity(k) for k in range(2, 4 if arguments.quick else MOST_BITS + 1))]
    fits = {
        (case.name, name): [
            fit(case, kind, components, seed, restarts, steps) for seed in range(arguments.seeds)
        ]
        for case in cases
        for name, (kind, components) in heads(case).items()
    }
    rows: list[harness.Row] = [
        _row("J1" if case is HANDS else "J2", case, name, fits) for case in cases for name in heads(case)
    ]
    by_hand, case = parity_by_hand(BITS_BY_HAND), even_parity(BITS_BY_HAND)
    rows.append(
        {
            "claim": "J2",
            "case": case.name,
            "head": BY_HAND,
            "value": excess_bits(by_hand, case),
            "real_mass": real_mass(by_hand, case),
        }
    )
    for case in cases:
        if case.name in VERIFIED:
            for name in heads(case):
                found = [tokens_per_pass(model, case) for model in fits[case.name, name]]
                rows.append(
                    {"claim": "J3", "case": case.name, "head": name, "value": harness.over_seeds(found)}
                )
    if arguments.picture:
        _save_figure(rows, fits, arguments.picture)
    return rows


def _row(claim: str, case: Case, name: str, fits: Fits) -> dict:
    models = fits[case.name, name]
    return {
        "claim": claim,
        "case": case.name,
        "head": name,
        "value": harness.over_seeds([excess_bits(model, case) for model in models]),
        "real_mass": harness.over_seeds([real_mass(model, case) for model in models]),
    }


BLUE, LIGHT_BLUE, RED, GREEN = "#0b6fb8", "#8cc4ee", "#c8372d", "#2c8a4b"


def _save_figure(rows: Sequence[harness.Row], fits: Fits, path: Path) -> None:
    values = {
        (row["claim"], row["case"], row["head"]): row["value"].value
        for row in rows
        if row["head"] != BY_HAND  # of more bits than the figure has
    }
    figure = Figure(figsize=(11.5, 7.2), layout="constrained")
    axes = figure.subplots(2, 3).flatten()
    _draw_pairs(axes[0], fits[HANDS.name, "independent"][0])
    axes[0].set_title("J1: independent words deal a high house")
    _draw_pairs(axes[1], fits[HANDS.name, "mixture, 2 components"][0])
    axes[1].set_title("J1: two components, two hands each")
    _draw_hands(axes[2], values)
    _draw_components(axes[3], values)
    _draw_lengths(axes[4], values)
    _draw_kept(axes[5], values)
    for axis in axes[2:]:
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes:
        axis.title.set_fontsize(10.5)
    figure.savefig(drawn := BytesIO(), dpi=110)
    path.parent.mkdir(parents=True, exist_ok=True)
    # a palette takes half of the bytes and no eye sees it
    Image.open(drawn).convert("RGB").quantize(96, dither=Image.Dither.NONE).save(path, optimize=True)


def _draw_pairs(axis: Axes, model: InOneContext) -> None:
    table = pair_probabilities(model).numpy()
    axis.imshow(table, cmap="Blues", vmin=0, vmax=0.3)
    for i, j in np.ndindex(table.shape):
        axis.text(j, i, f"{table[i, j]:.4f}".rstrip("0").rstrip("."), ha="center", va="center", fontsize=9)
    for i in range(len(table)):
        axis.add_patch(Rectangle((i - 0.47, i - 0.47), 0.94, 0.94, fill=False, edgecolor=RED, lw=2))
    axis.set_xticks(range(4), SECOND_WORDS)
    axis.set_yticks(range(4), FIRST_WORDS)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    axis.set_xlabel(f"probability; real hands (red) have {table.trace():.3f} in all")


def _draw_hands(axis: Axes, values: Values) -> None:
    names = list(heads(HANDS))
    bits = [values["J1", HANDS.name, name] for name in names]
    colors = [
        {"independent": RED, "mixture": BLUE, "hmm": GREEN, "chain": "black"}[kind]
        for kind, _ in heads(HANDS).values()
    ]
    axis.bar(range(len(names)), bits, color=colors, width=0.65)
    for x, value in enumerate(bits):
        axis.text(x, max(value, 0) + 0.04, f"{value:.2f}", ha="center", fontsize=9)
    axis.set_xticks(range(len(names)), [SHORT[name] for name in names], fontsize=8.5)
    axis.set(ylabel="excess bits a hand", ylim=(0, 2.2))
    axis.set_title("J1: what training leaves")


def _draw_components(axis: Axes, values: Values) -> None:
    for case, color in zip(_parity_cases(values), (GREEN, BLUE, RED, "black"), strict=False):
        curve = {
            components: values["J2", case.name, name]
            for name, (kind, components) in heads(case).items()
            if kind in ("independent", "mixture")
        }
        x, y = zip(*curve.items(), strict=True)
        axis.plot(x, y, "o-", color=color, lw=1.3, label=f"{case.num_tokens} bits")
    axis.set_xscale("log", base=2)
    axis.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    axis.set(xlabel="components of the mixture", ylabel="excess bits a string", ylim=(-0.05, 1.3))
    axis.set_title("J2: a mixture needs $2^{k-1}$ components")
    axis.legend(fontsize=8.5, frameon=False, loc="upper center", ncols=4, columnspacing=0.8, handlelength=1)


def _draw_lengths(axis: Axes, values: Values) -> None:
    styles = {
        "independent": (RED, "o-", 1.5),
        "mixture, 2 components": (LIGHT_BLUE, "o-", 1.5),
        "mixture, 4 components": (BLUE, "o-", 1.5),
        "hidden Markov, 4 states": (GREEN, "o-", 4.0),
        "chain": ("black", "o:", 1.5),
    }
    for name, (color, line, width) in styles.items():
        found = [(case.num_tokens, values.get(("J2", case.name, name))) for case in _parity_cases(values)]
        points = [(bits, value) for bits, value in found if value is not None]
        if points:
            axis.plot(*zip(*points, strict=True), line, color=color, lw=width, ms=5, label=SHORT[name])
    axis.set(xlabel="bits k", ylabel="excess bits a string", ylim=(-0.05, 1.4))
    axis.set_xticks([case.num_tokens for case in _parity_cases(values)])
    axis.set_title("J2: HMM and chain need no more for more bits")
    axis.legend(fontsize=8.5, frameon=False, loc="upper center", ncols=3, columnspacing=1)


def _draw_kept(axis: Axes, values: Values) -> None:
    for case, color in ((HANDS, BLUE), (even_parity(4), GREEN)):
        here: dict[tuple[float, float], list[str]] = {}
        for name in heads(case):
            if ("J3", case.name, name) in values:
                bits = values["J1" if case is HANDS else "J2", case.name, name]
                point = round(bits, 2), round(values["J3", case.name, name], 2)
                here.setdefault(point, []).append(SHORT[name])
        for (bits, tokens), names in here.items():
            axis.plot(abs(bits), tokens, "o", color=color, clip_on=False)
            # labels keep clear of the line and of each other
            below_line = tokens < case.num_tokens
            side = -1 if below_line and bits < 0.9 else 1
            axis.annotate(
                ", ".join(names),
                (bits, tokens),
                (7 * side, -3 if below_line else 5),
                textcoords="offset points",
                ha="left" if side > 0 else "right",
                fontsize=8.5,
            )
        axis.axhline(case.num_tokens, color=color, ls="--", lw=1)
        label = f"{case.name.partition(',')[0]}: at most {case.num_tokens}"
        axis.text(2.5, case.num_tokens + 0.05, label, ha="right", fontsize=8.5, color=color)
    axis.set(xlabel="excess bits", ylabel="tokens committed a pass", xlim=(-0.05, 2.5), ylim=(0.9, 4.4))
    axis.set_title("J3: better drafts save passes")


def _parity_cases(values: Values) -> list[Case]:
    return [case for k in range(2, MOST_BITS + 1) if ("J2", (case := even_parity(k)).name, "chain") in values]


if __name__ == "__main__":
    harness.run("joint_tokens", Arguments, measure, __doc__)
