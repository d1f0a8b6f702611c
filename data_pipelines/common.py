"""What the pipelines share: the command-line frame, npm packages, splits by hash, and the printed summary.

Knows no data set. A pipeline is a frozen dataclass of options and a `build(options)` that returns a `Manifest`.
"""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
from rich.console import Console
from rich.progress import track

from mmgen.data.rejects import Rejects
from mmgen.data.shards import Manifest
from mmgen.rng import keyed_numpy
from mmgen.sequence import Sample

T = TypeVar("T")
Options = TypeVar("Options")


def run(
    options: type[Options], build: Callable[[Options], Manifest], argv: Sequence[str] | None = None
) -> int:
    """Parses `argv` into `options`, builds, and returns the exit code: 2 with one line for a user's mistake."""
    module = sys.modules[build.__module__]
    name = module.__spec__.name if module.__spec__ else module.__name__
    try:
        build(tyro.cli(options, args=argv, prog=f"python -m {name}", description=module.__doc__))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def progress(items: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
    """`items` with a progress bar, on a terminal only."""
    console = Console(stderr=True)
    return track(items, what, total, console=console, disable=not console.is_terminal, transient=True)


def hash_share(*key: int | str) -> float:
    """A number in [0, 1) that only `key` decides: what splits by hash compare with a rate."""
    return float(keyed_numpy(*key).random())


def check_share(option: str, share: float) -> None:
    """Raises ValueError where `share`, given as `option`, is not in [0, 1)."""
    if not 0 <= share < 1:
        raise ValueError(f"{option} must be at least 0 and below 1, not {share}")


def split_by_hash(name: str, validation: float) -> str:
    """ "validation" for a share of the names, else "train"; a name's split never depends on the other samples."""
    return "validation" if hash_share("validation", name) < validation else "train"


def read_jsonl(path: Path, rejects: Rejects) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line of a JSONL file; lines that are no objects are counted as broken."""
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict):
                yield number, row
            else:
                rejects.reject("bad json", f"{path}, line {number}")


def usable(samples: Iterable[Sample], rejects: Rejects, where: str, counts: Counter[str]) -> Iterator[Sample]:
    """`samples`, counted into `counts` on the way. Raises ValueError where there was not one, saying why."""
    for sample in samples:
        rejects.keep()
        texts = [*sample.captions.values(), *(part for part in sample.parts if isinstance(part, str))]
        counts["samples"] += 1
        counts["pictures"] += (sample.picture is not None) + sum(
            not isinstance(part, str) for part in sample.parts
        )
        counts["texts"] += len(texts)
        counts["words"] += sum(len(text.split()) for text in texts)
        yield sample
    rejects.finish(where)


def print_summary(folder: Path, manifest: Manifest, counts: Mapping[str, int], rejects: Rejects) -> None:
    """What was written, per split, and what was left out and why."""
    held = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
    splits = ", ".join(f"{split} {manifest.num_samples(split):,}" for split in manifest.splits)
    print(f"{folder}: {held}; {manifest.num_bytes / 1e6:.1f} MB")
    print(f"splits: {splits}")
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in rejects.samples.most_common())
    print(f"left out: {reasons or 'nothing'}")


def npm_packages(packages: Mapping[str, str], folder: Path | None) -> Path:
    """Installs npm `packages` (name -> version) into `folder`, by default in the user's cache; returns node_modules.

    Needs no npm where the folder has them already. Raises ValueError where npm is missing or fails.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = folder or cache / "mmgen" / "npm"
    modules = folder / "node_modules"
    missing = [
        f"{name}@{version}" for name, version in packages.items() if _installed(modules / name) != version
    ]
    if not missing:
        return modules
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError(
            f"npm is needed to fetch {', '.join(missing)} and is not installed (Debian: apt-get install npm); "
            "or pass --packages with a folder where `npm install` has put them"
        )
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        npm,
        "install",
        "--prefix",
        str(folder),
        "--no-audit",
        "--no-fund",
        "--ignore-scripts",
        *missing,
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.startswith(("npm error", "npm ERR!"))]
        raise ValueError(f"npm could not install {', '.join(missing)}: {(lines or ['it said nothing'])[0]}")
    return modules


def _installed(package: Path) -> str | None:
    try:
        return json.loads((package / "package.json").read_text(encoding="utf-8"))["version"]
    except (OSError, ValueError, KeyError):
        return None
