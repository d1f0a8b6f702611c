"""What every benchmark shares: its command line, timing that survives a busy machine, the table and the JSON file.

A benchmark is a module with a dataclass of arguments and a function from them to rows:

    @dataclass(frozen=True)
    class Arguments(harness.Arguments):
        length: int = 1024
        \"\"\"Tokens of a document.\"\"\"

    def measure(arguments: Arguments) -> list[Row]: ...  # or yields them

    if __name__ == "__main__":
        harness.run("attention", Arguments, measure, __doc__)

Rows hold numbers, text and `Estimate`s (a value with its 95 % interval).
"""

import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from rich.console import Console
from rich.table import Table
from scipy import stats

from mmgen.cli.arguments import parse
from mmgen.cli.tables import print_line, show
from mmgen.config import to_mapping
from mmgen.evaluation.intervals import DRAWS, Estimate
from mmgen.files import write_text
from mmgen.rng import keyed_numpy
from mmgen.sampling.calibration import processor
from mmgen.versions import KERNELS, versions

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    *KERNELS,
    "numpy",
    "transformers",
    "diffusers",
    "transfusion-pytorch",
    "webdataset",
    "scikit-learn",
    "wandb",
)

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Arguments:
    """What every benchmark takes."""

    seeds: int = 3
    """How often the whole measurement is repeated, with seeds 0, 1, ..."""
    out: Path | None = None
    """The JSON file to write; benchmarks/results/<name>.json where it is not given."""
    quick: bool = False
    """A minute at most: smaller sizes and fewer repeats, to see that it runs. Its figures claim nothing."""

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, is {self.seeds}")


A = TypeVar("A", bound=Arguments)


def run(
    name: str,
    cls: type[A],
    measure: Callable[[A], Iterable[Row]],
    doc: str | None,
    argv: Sequence[str] | None = None,
) -> Path:
    """Reads the command line, measures, prints a table, writes the JSON file and returns its path.

    Rows that `measure` yields are kept beside the file as they come, in one that ends in .part, so that a run which is
    cut leaves what it measured; it goes when the run is whole. A mistake in the arguments, or a ValueError of the
    measurement, is one line on stderr and exit code 2.
    """
    prog = f"python -m benchmarks.{name}"
    try:
        arguments = parse(cls, sys.argv[1:] if argv is None else argv, prog)
        out = arguments.out or RESULTS / f"{name}.json"
        part = out.with_name(out.name + ".part")
        started, commit = time.perf_counter(), revision()
        rows: list[Row] = []

        def write(path: Path) -> None:
            record = {
                "name": name,
                "what": " ".join((doc or "").split("\n\n")[0].split()),
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "seconds": round(time.perf_counter() - started, 1),
                "machine": machine(),
                "versions": versions(PACKAGES),
                "revision": commit,
                # where it is written decides no figure
                "arguments": to_mapping(dataclasses.replace(arguments, out=None)),
                "rows": [{key: _json(value) for key, value in row.items()} for row in rows],
            }
            write_text(path, json.dumps(record, indent=1, allow_nan=False) + "\n")

        found = measure(arguments)
        for row in found:
            rows.append(row)
            if not isinstance(found, Sequence):
                write(part)
    except ValueError as error:
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    write(out)
    part.unlink(missing_ok=True)
    console = Console()
    show(console, table(name, rows))
    print_line(console, f"{time.perf_counter() - started:.1f} s; written to {out}")
    return out


def table(title: str, rows: Sequence[Row]) -> Table:
    """Returns the rows as a table; a column for every key, in the order of first appearance."""
    shown = Table(title=title)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        numeric = all(not isinstance(row.get(column), str) for row in rows)
        shown.add_column(column, justify="right" if numeric else "left")
    for row in rows:
        shown.add_row(*(_cell(row.get(column)) for column in columns))
    return shown


def over_seeds(values: Sequence[float]) -> Estimate:
    """Returns the mean over seeds and its 95 % interval by Student's t; one seed has no interval (NaN)."""
    n, mean = len(values), statistics.fmean(values)
    half = float("nan")
    if n > 1:
        half = float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(values) / n**0.5
    return Estimate(mean, mean - half, mean + half, n)


def median(values: ArrayLike, *key: int | str) -> Estimate:
    """Returns the median with its bootstrap interval of 95 %, drawn by `key`."""
    given = np.asarray(values)
    drawn = keyed_numpy(*key).integers(len(given), size=(DRAWS, len(given)))
    low, high = np.quantile(np.median(given[drawn], axis=1), [0.025, 0.975])
    return Estimate(float(np.median(given)), float(low), float(high), len(given))


def power(lengths: ArrayLike, amounts: ArrayLike) -> Any:
    """p of amounts [..., N] ~ lengths [N]^p by least squares of logarithms: how they grow."""
    x = np.log(lengths)
    x = x - x.mean()
    return (np.log(amounts) * x).sum(-1) / (x**2).sum()


@dataclass(frozen=True)
class Comparison:
    """Two pieces of code timed in turns: median seconds of each, and how many times longer `a` takes than `b`."""

    a: float
    b: float
    ratio: Estimate


def compare(
    a: Callable[[], object], b: Callable[[], object], *, repeats: int = 20, warmup: int = 2, seed: int = 0
) -> Comparison:
    """Times `a` and `b` in pairs, the order changing from pair to pair.

    What slows the machine for a while slows both of a pair. The ratio is the median over pairs, with a bootstrap
    interval of 95 %.
    """
    times = in_turns([a, b], repeats=repeats, warmup=warmup)
    ratio = median(times[:, 0] / times[:, 1], "compare", seed)
    return Comparison(float(np.median(times[:, 0])), float(np.median(times[:, 1])), ratio)


def scaled(estimate: Estimate, by: float) -> Estimate:
    """`by` times as much, as of calls that do as many times the work of each other."""
    return dataclasses.replace(
        estimate, value=estimate.value * by, low=estimate.low * by, high=estimate.high * by
    )


def in_turns(
    calls: Sequence[Callable[[], object]], *, repeats: int, warmup: int = 2
) -> Float[np.ndarray, "R N"]:
    """Seconds of each of N calls in each of R rounds; every other round goes through them backwards."""
    if repeats < 2:
        raise ValueError(f"repeats must be at least 2, is {repeats}")
    for _ in range(warmup):
        for call in calls:
            call()
    times = np.zeros((repeats, len(calls)))
    for number, row in enumerate(times):
        for i in range(len(calls))[:: -1 if number % 2 else 1]:
            row[i] = seconds(calls[i])
    return times


def seconds(call: Callable[[], object]) -> float:
    """Returns how long one call takes, the work it left on the GPU included."""
    _wait()
    start = time.perf_counter()
    call()
    _wait()
    return time.perf_counter() - start


def machine() -> dict[str, Any]:
    """Returns what the figures depend on: processor, cores that this process may use, memory, GPUs, system."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    driver = _driver() if gpus else None
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "gpus": gpus,
        **({"driver": driver.splitlines()[0]} if driver else {}),
        "system": f"{platform.system()} {platform.machine()}",
        "torch_threads": torch.get_num_threads(),
    }


def revision() -> dict[str, Any]:
    """Returns the git commit that was measured and whether files differed from it; None where there is no git."""

    def git(*words: str) -> str | None:
        return _output("git", "-C", str(ROOT), *words)

    changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return {"commit": git("rev-parse", "HEAD"), "changed": None if changed is None else bool(changed)}


@cache  # rows that are written as they come would each ask anew
def _driver() -> str | None:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _output(*command: str) -> str | None:
    """What a command prints; None where it is not there or fails."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _json(value: Any) -> Any:
    """JSON without NaN, which it has no word for: null."""
    if isinstance(value, Estimate):
        return {key: _json(item) for key, item in dataclasses.asdict(value).items()}
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def _cell(value: Any) -> str:
    if isinstance(value, Estimate):
        return f"{value:.4g}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)
