"""What a jump that is not told where it goes cannot do: the first demonstration of arXiv 2503.07154, as three claims.

T1: one Euler step of flow matching's optimum returns the mean of any data set. T2: on data N(0, d^2) a jump blind to
its target time cannot follow the probability flow to two targets; how far it stays away has a closed form, and training
ends there. T3: no blind map of numbers has the right law at every target time; a test of the variance may not see
that, tests of the law do. docs/target_time.md has the argument, benchmarks/jumps.py the maps.

The value of a row is, for T1, the variance of the samples over that of the data; for T2 the error of a jump in units of
the variance, beside the least that the map could have; for T3 the largest Kolmogorov-Smirnov distance over s, beside
the number of seeds in which a test rejects the map.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats

from benchmarks import harness
from benchmarks.jumps import (
    CASES,
    EDGE,
    HEADLINE,
    INTERVAL,
    TESTS,
    Jump,
    Trained,
    blind_slopes,
    data_sets,
    euler,
    floor,
    from_noise,
    ks_distance,
    low_digits,
    normal_quantiles,
    optimal_output,
    rejected,
    sign_flip,
    standard_deviation,
    train_flow_matching,
    train_jump,
    train_on_laws,
    true_map,
    variance_share,
)
from mmgen.objectives import FlowMatching, FlowMatchingConfig
from mmgen.rng import keyed_torch

EULER_STEPS = (1, 2, 4, 8, 16, 32)
LEARNED = ("moons", "digits")  # data sets of T1 that a network is trained on too


@dataclass(frozen=True)
class Arguments(harness.Arguments):
    steps: int = 300
    """Training steps of each network of T2; those of T1 and T3 take three times and twice as many."""
    num: int = 1000
    """Draws that a test of T3 sees, for each target time."""
    picture: Path | None = None
    """Where the figure goes; none is drawn where it is not given."""


def measure(arguments: Arguments) -> list[harness.Row]:
    seeds, steps = arguments.seeds, 60 if arguments.quick else arguments.steps
    shares, rows = _means(seeds, 3 * steps)
    trained = {
        (case.name, told): [train_jump(case, told, seed, steps) for seed in range(seeds)]
        for case in CASES
        for told in (False, True)
    }
    rows += _floors(trained)
    jumps: dict[str, Sequence[Jump]] = {
        "true map": [true_map],
        "told network": trained[INTERVAL.name, True],
        "blind network, fits the map": trained[INTERVAL.name, False],
        "blind network, fits the laws": [train_on_laws(seed, 2 * steps) for seed in range(seeds)],
        "sign flip (decoy)": [sign_flip],
        "low digits, 16 pieces": [low_digits(16)],
        "low digits, 1024 pieces": [low_digits(1024)],
    }
    rows += _laws(seeds, 300 if arguments.quick else arguments.num, jumps)
    if arguments.picture:
        _save_figure(shares, trained, jumps, arguments.picture)
    return rows


def _means(seeds: int, steps: int) -> tuple[dict[str, list[float]], list[harness.Row]]:
    """T1: by map, the share of the variance at each of EULER_STEPS; and the rows."""
    path, rows = FlowMatching(FlowMatchingConfig()).path, []
    shares: dict[str, list[float]] = {}
    for name, data in data_sets().items():
        outputs = {"exact optimum": [optimal_output(path, data)]}
        if name in LEARNED:
            outputs["network"] = [train_flow_matching(data, seed, steps) for seed in range(seeds)]
        unit = torch.randn(300, data.shape[1], dtype=torch.float64, generator=keyed_torch("T1", name))
        for kind, runs in outputs.items():
            found = [
                [variance_share(euler(path, output, path.sigma_data * unit, n), data) for n in EULER_STEPS]
                for output in runs
            ]
            shares[f"{name}, {kind}"] = [float(np.mean(values)) for values in zip(*found, strict=True)]
            for n in (1, 4, 32):
                case = f"{name}, {data.shape[1]}-d, {n} step{'s' if n > 1 else ''}"
                rows.append(_row("T1", case, kind, [one[EULER_STEPS.index(n)] for one in found]))
    return shares, rows


def _floors(trained: Mapping[tuple[str, bool], Sequence[Trained]]) -> list[harness.Row]:
    """T2: the error that each arm ends at, beside the least that it could have."""
    rows = []
    for case in CASES:
        for told, arm in ((False, "blind network"), (True, "told network")):
            errors = [run.curve[-1][1] for run in trained[case.name, told]]
            rows.append({**_row("T2", case.name, arm, errors), "least": 0.0 if told else floor(case)})
    return rows


def _laws(seeds: int, num: int, jumps: Mapping[str, Sequence[Jump]]) -> list[harness.Row]:
    """T3: how far from p_s a map is where it is worst, and in how many seeds each test rejects it."""
    rows = []
    for name, runs in jumps.items():
        worst = [max(ks_distance(run, s) for s in np.linspace(0, 1, 21)) for run in runs]
        found = [rejected(runs[seed % len(runs)], num, seed) for seed in range(seeds)]
        counts = ", ".join(f"{test} {sum(one[test] for one in found)}" for test in TESTS)
        rows.append({**_row("T3", "d = 1, s in [0, 1]", name, worst), "seeds_that_reject": counts})
    return rows


def _row(claim: str, case: str, arm: str, values: Sequence[float]) -> dict:
    value = harness.over_seeds(values) if len(values) > 1 else values[0]
    return {"claim": claim, "case": case, "map": arm, "value": value}


BLUE, LIGHT_BLUE, RED, GREEN, GREY = "#0b6fb8", "#8cc4ee", "#c8372d", "#2c8a4b", "#808080"


def _save_figure(
    shares: Mapping[str, Sequence[float]],
    trained: Mapping[tuple[str, bool], Sequence[Trained]],
    jumps: Mapping[str, Sequence[Jump]],
    path: Path,
) -> None:
    figure = Figure(figsize=(11.5, 7.2), layout="constrained")
    axes = figure.subplots(2, 3).flatten()
    _draw_shares(axes[0], shares)
    _draw_lines(axes[1])
    _draw_training(axes[2], trained)
    _draw_over_s(axes[3], axes[4], jumps)
    _draw_decoy(axes[5])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_fontsize(10.5)
    figure.savefig(drawn := BytesIO(), dpi=110)
    path.parent.mkdir(parents=True, exist_ok=True)
    # a palette takes half of the bytes and no eye sees it
    Image.open(drawn).convert("RGB").quantize(96, dither=Image.Dither.NONE).save(path, optimize=True)


def _draw_shares(axis: Axes, shares: Mapping[str, Sequence[float]]) -> None:
    sets = list(dict.fromkeys(name.split(",")[0] for name in shares))
    for name, values in shares.items():
        network = name.endswith("network")
        axis.plot(
            EULER_STEPS,
            values,
            "o" if network else "-",
            color=f"C{sets.index(name.split(',')[0])}",
            label=name.replace(", exact optimum", ""),
        )
    axis.set_xscale("log", base=2)
    axis.set_xticks(EULER_STEPS, [str(n) for n in EULER_STEPS])
    axis.set(
        xlabel="Euler steps from noise to data", ylabel="variance of samples / of data", ylim=(-0.04, 1.1)
    )
    axis.set_title("T1: one step of flow matching draws the mean")
    axis.legend(fontsize=8.5, frameon=False, loc="lower right")


def _draw_lines(axis: Axes) -> None:
    s = np.linspace(0, 1, 101)
    for d, color in ((2.0, GREEN), (1.0, BLUE), (0.5, RED)):
        case = from_noise(d, 0.0, 0.5)
        k = blind_slopes(case)[0].item()
        axis.plot(s, np.hypot((1 - s) * d, s), color=color, label=f"the flow, d = {d:g}")
        axis.plot(s, 1 + (s - 1) * k, "--", color=color, lw=1.2)
        axis.plot([0, 0.5], [np.hypot(d, 0), np.hypot(d / 2, 0.5)], "o", color=color, ms=5)
    axis.plot([], [], "--", color="black", lw=1.2, label="best blind jump to both dots")
    axis.set(xlabel="target time s (from t = 1)", ylabel="$x_s$ / $x_1$", ylim=(0.3, 2.1))
    axis.set_title("T2: a blind jump is a straight line in s")
    axis.legend(fontsize=8.5, frameon=False)


def _draw_training(axis: Axes, trained: Mapping[tuple[str, bool], Sequence[Trained]]) -> None:
    for told, color, label in ((False, RED, "blind: u(x, t)"), (True, BLUE, "told: u(x, t, s)")):
        for seed, run in enumerate(trained[HEADLINE.name, told]):
            steps, errors = zip(*run.curve, strict=True)
            axis.loglog(steps, errors, color=color, lw=1.3, label=label if seed == 0 else None)
    least = floor(HEADLINE)
    axis.axhline(least, color="black", ls="--", lw=1)
    axis.text(
        0.97,
        least * 0.75,
        f"floor {least:.4f}",
        va="top",
        ha="right",
        fontsize=9,
        transform=axis.get_yaxis_transform(),
    )
    axis.set(xlabel="training step", ylabel="error / variance, both targets", ylim=(1e-8, 0.3))
    axis.set_title("T2: training, d = 1, targets 0 and 1/2")
    axis.legend(fontsize=8.5, frameon=False, loc="lower left")


def _draw_over_s(variance: Axes, law: Axes, jumps: Mapping[str, Sequence[Jump]]) -> None:
    targets, x = np.linspace(0, 1, 41), normal_quantiles(2000)
    styles = {
        "told network": (LIGHT_BLUE, "-", 4.0),
        "blind network, fits the map": (RED, "-", 1.5),
        "blind network, fits the laws": ("black", ":", 1.5),
        "sign flip (decoy)": ("black", "-", 1.3),
        "low digits, 16 pieces": (GREY, "--", 1.3),
    }
    for name, (color, line, width) in styles.items():
        jump = jumps[name][0]
        ratios = [jump(x, s).var() / true_map(x, s).var() for s in targets]
        variance.plot(targets, ratios, line, color=color, lw=width, label=name)
        law.plot(targets, [ks_distance(jump, s) for s in targets], line, color=color, lw=width, label=name)
    variance.set(xlabel="target time s", ylabel="variance of $x_s$ / of $p_s$")
    variance.set_title("T3: the decoy's variance is right at every s")
    law.set(xlabel="target time s", ylabel="KS distance to $p_s$")
    law.set_title("T3: but its law is wrong")
    variance.legend(fontsize=8.5, frameon=False)


def _draw_decoy(axis: Axes) -> None:
    s, x = 0.5, normal_quantiles(200_000)
    x_s, true = sign_flip(x, s), standard_deviation(s)
    inner = x_s[x_s != 0]
    counts, edges = np.histogram(inner, bins=np.linspace(-EDGE, EDGE, 41))
    axis.stairs(counts / len(x) / np.diff(edges), edges, fill=True, color="#c9c9c9", label="sign flip")
    atom = 1 - len(inner) / len(x)
    axis.plot([0, 0], [0, 0.62], color="black", lw=3)
    axis.annotate(f"an atom: {atom:.1%} of all x", (0.03, 0.6), (0.15, 0.6), fontsize=9, va="center")
    grid = np.linspace(-2.2, 2.2, 201)
    axis.plot(grid, stats.norm.pdf(grid, scale=true), color=BLUE, label="$p_s$")
    axis.set(xlabel="$x_s$ at s = 1/2", ylabel="density", ylim=(0, 0.68), xlim=(-2.2, 2.2))
    axis.set_title(f"T3: right variance, kurtosis {stats.kurtosis(x_s, fisher=False):.2f} and not 3")
    axis.legend(fontsize=8.5, frameon=False, loc="upper left")


if __name__ == "__main__":
    harness.run("blind_jump", Arguments, measure, __doc__)
