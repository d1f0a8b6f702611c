"""`mmgen report RUN [RUN ...]`: one page of what `mmgen tradeoff` measured, that opens without a network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from torch import Tensor

from mmgen.cli.arguments import parse
from mmgen.evaluation.frontier import REAL
from mmgen.evaluation.report import Measurement, report
from mmgen.evaluation.store import FEATURES, REAL_FEATURES, SAMPLES, SUMMARY, plan_digest, read_line
from mmgen.evaluation.tradeoff import HITS, halves
from mmgen.files import write_text
from mmgen.sampling.planner import read_record


@dataclass(frozen=True)
class Report:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """folders of runs, or folders that `mmgen tradeoff --out` wrote"""
    out: Path = Path("report.html")
    """the page"""


def main(argv: Sequence[str]) -> int:
    args = parse(Report, argv, "mmgen report")
    if not args.runs:
        raise ValueError("which run? mmgen report RUN [RUN ...] (see mmgen report --help)")
    if args.out.is_dir():
        raise ValueError(
            f"--out {args.out} is a folder: name the page's file, such as {args.out / 'report.html'}"
        )
    folders = [measured_folder(run) for run in args.runs]
    if len(set(folders)) < len(folders):
        raise ValueError(f"a run is named twice: {' '.join(map(str, args.runs))}")
    made = [measurement(folder, name) for folder, name in zip(folders, names(args.runs), strict=True)]
    page = report(made)
    write_text(args.out, page)
    plans = sum(len(each.record["rows"]) for each in made)
    print(f"{args.out}: {plans} plans of {', '.join(each.name for each in made)}, {len(page) / 1e6:.1f} MB")
    return 0


def measured_folder(run: Path) -> Path:
    """The folder that has a run's tradeoff.json. Raises ValueError where there is none."""
    for folder in (run / "tradeoff", run):
        if (folder / SUMMARY).is_file():
            return folder.resolve()
    raise ValueError(f"{run} has no {SUMMARY}: `mmgen tradeoff {run}` measures first what a report shows")


def names(runs: Sequence[Path]) -> list[str]:
    """The last parts of the folders' paths, as many as tell them apart."""
    parts = [[part for part in run.resolve().parts if part != "tradeoff"] for run in runs]
    for length in range(1, max(map(len, parts)) + 1):
        found = ["/".join(each[-length:]) for each in parts]
        if len(set(found)) == len(found):
            return found
    return list(map(str, runs))


def measurement(folder: Path, name: str) -> Measurement:
    """What a folder holds. Raises ValueError where its tradeoff.json is none."""
    record = read_record(folder / SUMMARY)
    rows = {plan_digest(row["plan"]): index for index, row in enumerate(record["rows"])}
    pictures = {
        rows[digest]: strip.read_bytes()
        for strip in sorted((folder / "pictures").glob("*.png"))
        if (digest := strip.stem.rsplit("-", 1)[-1]) in rows
    }
    hits = _hits(folder / SAMPLES, rows, record.get("num"))
    return Measurement(name, record, pictures, hits, _features(folder / FEATURES, rows, record.get("num")))


def _features(folder: Path, rows: Mapping[str, int], num: int | None) -> dict[int, Tensor]:
    """Those of the reported half, of each row and of the real pictures; nothing where the real ones were not kept."""
    if not (folder / REAL_FEATURES).is_file():
        return {}
    found = {}
    for path in sorted(folder.glob("*.npy")):
        digest = path.stem.rsplit("-", 1)[-1]
        index = REAL if path.name == REAL_FEATURES else rows.get(digest)
        if index is not None:
            try:
                features = torch.from_numpy(np.load(path, allow_pickle=False)).float()
            except (OSError, EOFError, ValueError):
                continue  # cut in the middle
            if features.ndim == 2 and len(features) == num:
                found[index] = features[halves(len(features))[1]]
    return found


def _hits(path: Path, rows: Mapping[str, int], num: int | None) -> dict[tuple[int, str], list[bool]]:
    """(row, figure) -> of every picture of the reported half, whether it is a hit; nothing where no line was kept."""
    if not path.is_file():
        return {}
    by_plan: dict[int, list[dict[str, Any]]] = {}
    for sample in filter(None, map(read_line, path.read_bytes().splitlines()[1:])):
        index = rows.get(plan_digest(sample["plan"]))
        if index is not None:
            by_plan.setdefault(index, []).append(sample)
    found = {}
    whole = {index: samples for index, samples in by_plan.items() if len(samples) == num}
    for index, samples in whole.items():
        reported = halves(len(samples))[1].tolist()
        for figure in HITS:
            if figure in samples[0]:
                found[index, figure] = [samples[i][figure] for i in reported]
    return found
