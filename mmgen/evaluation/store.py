"""What `mmgen tradeoff` has measured, in a folder: kept plan by plan, so that it goes on where it was cut."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from mmgen.config import from_mapping
from mmgen.evaluation.latency import Latencies, measure_latencies
from mmgen.evaluation.text_surface import plain
from mmgen.evaluation.tradeoff import HITS, Judge, Measured
from mmgen.files import write_text
from mmgen.sampling.calibration import Machine
from mmgen.sampling.plan import Plan
from mmgen.sampling.sampler import Sampler

SAMPLES = "tradeoff.jsonl"
SUMMARY = "tradeoff.json"
LATENCY = "latency.json"
TEXTS = "texts.json"
FEATURES = "features"
REAL_FEATURES = "real.npy"
SHOWN = 24  # prompts whose pictures are kept
SHARED = ("nfe", "flops", "seconds", "memory", "score_flops", "score_seconds")  # by all pictures of a plan


class Store:
    """A folder of measured plans: a line for every picture, its features, and some pictures to look at.

    Raises ValueError where the folder holds measurements of other prompts, noise or weights.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any], keys: Sequence[str]) -> None:
        self.folder = folder
        self.keys = list(keys)
        self.path = folder / SAMPLES
        self.found: dict[Plan, Measured] = {}
        if not self.path.is_file():
            write_text(self.path, json.dumps(dict(header)) + "\n")
            return
        lines = self.path.read_bytes().splitlines()
        try:
            there = dict(json.loads(lines[0]))
        except (ValueError, TypeError, IndexError):
            raise ValueError(
                f"{self.path} does not say what it was measured of: name another folder with --out, or remove it"
            ) from None
        there.setdefault("precision", "float32")  # what was measured before there was another
        other = [
            f"{name} {there.get(name)}, not {value}"
            for name, value in header.items()
            if there.get(name) != value
        ]
        by_plan: dict[str, list[dict[str, Any]]] = {}
        for row in filter(None, map(read_line, lines[1:])):
            by_plan.setdefault(json.dumps(row["plan"]), []).append(row)
        prompts = set(self.keys)
        drawn = [[row["key"] for row in rows] for rows in by_plan.values()]
        if not prompts.issuperset(key for keys in drawn for key in keys):
            other.append("pictures that are not of these prompts")
        elif any(keys != self.keys and sorted(keys) == sorted(self.keys) for keys in drawn):
            other.append("its prompts in another order")
        if other:
            raise ValueError(
                f"{self.path} has {'; '.join(other)}: name another folder with --out, or remove it"
            )
        found = {key: self._load(key, rows) for key, rows in by_plan.items()}
        # what was cut or is broken is measured again
        kept = [
            json.dumps(row).encode()
            for key, rows in by_plan.items()
            if found[key] is not None
            for row in rows
        ]
        if kept != lines[1:]:
            write_text(self.path, b"\n".join([lines[0], *kept]).decode() + "\n")
        self.found = {each.plan: each for each in found.values() if each is not None}

    def _load(self, key: str, rows: Sequence[Mapping[str, Any]]) -> Measured | None:
        """What the rows of a plan and its features say; None where something is missing."""
        try:
            if [row["key"] for row in rows] != self.keys:
                return None
            plan = from_mapping(json.loads(key), Plan)
            features = torch.from_numpy(np.load(self._features(plan), allow_pickle=False)).float()
            hits = {name: torch.tensor([row[name] for row in rows]) for name in HITS if name in rows[0]}
            scores = torch.tensor([row["score"] for row in rows]) if "score" in rows[0] else None
            shared: dict[str, Any] = {name: rows[0][name] for name in SHARED}
        except (OSError, EOFError, ValueError, TypeError, KeyError):
            return None
        if features.ndim != 2 or len(features) != len(self.keys):
            return None
        return Measured(plan, features, hits, scores=scores, **shared)

    def add(self, measured: Measured, images: Sequence[Image.Image]) -> None:
        plan = measured.plan
        self._write(
            self._features(plan), lambda file: np.save(file, measured.features.numpy().astype(np.float16))
        )
        self._write(self._pictures(plan), lambda file: _strip(images[:SHOWN]).save(file, "png"))
        shared = {name: getattr(measured, name) for name in SHARED}
        lines = []
        for index, key in enumerate(self.keys):
            own: dict[str, Any] = {name: bool(hit[index]) for name, hit in measured.hits.items()}
            if measured.scores is not None:
                own["score"] = measured.scores[index].item()
            lines.append(json.dumps({"plan": asdict(plan), "key": key, **own, **shared}))
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.found[plan] = measured

    def timed(
        self,
        sampler: Sampler,
        judge: Judge,
        plans: Sequence[Plan],
        seed: int,
        on_plan: Callable[[], None] | None = None,
    ) -> list[Measured]:
        """The plans, which are there, with the seconds of a picture that is drawn alone: timed anew, all of them,
        unless all have been on a machine like this."""
        found = self._latencies(sampler, plans)
        if found is None:
            found = measure_latencies(sampler, judge.prompts, plans, seed, judge.scorer, on_plan)
            of_plans = [{"plan": asdict(plan), "seconds": seconds} for plan, seconds in found.plans.items()]
            record = {"machine": _machine(sampler), "scoring": found.scoring, "plans": of_plans}
            write_text(self.folder / LATENCY, json.dumps(record, indent=1) + "\n")
        return [
            replace(self.found[plan], seconds=found.plans[plan], score_seconds=found.scoring)
            for plan in plans
        ]

    def _latencies(self, sampler: Sampler, plans: Sequence[Plan]) -> Latencies | None:
        kept = _kept(self.folder / LATENCY, _machine(sampler))
        if kept is None:
            return None
        known = {from_mapping(each["plan"], Plan): each["seconds"] for each in kept["plans"]}
        return Latencies(known, kept["scoring"]) if set(plans) <= set(known) else None

    def texts(
        self, sampler: Sampler, measure: Callable[[], Sequence[dict[str, Any]]]
    ) -> list[dict[str, Any]]:
        """Rows of what several tokens a pass buy, measured where they are not there from a machine like this."""
        path = self.folder / TEXTS
        machine = _machine(sampler)
        if kept := _kept(path, machine):
            return kept["rows"]
        rows = plain(measure())
        write_text(path, json.dumps({"machine": machine, "rows": rows}, indent=1, allow_nan=False) + "\n")
        return rows

    def keep_real(self, features: Float[Tensor, "N F"]) -> None:
        """Those of the prompts' real pictures, beside the drawn ones'."""
        path = self.folder / FEATURES / REAL_FEATURES
        self._write(path, lambda file: np.save(file, features.numpy().astype(np.float16)))

    def _features(self, plan: Plan) -> Path:
        return self.folder / FEATURES / f"{_name(plan)}.npy"

    def _pictures(self, plan: Plan) -> Path:
        return self.folder / "pictures" / f"{_name(plan)}.png"

    @staticmethod
    def _write(path: Path, write: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
        with beside.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # before the lines that say that it is there
        os.replace(beside, path)


def read_line(line: bytes) -> dict[str, Any] | None:
    """A picture's line; None where it is none."""
    try:
        row = json.loads(line)
    except ValueError:  # no JSON, or bytes that are no text
        return None
    whole = isinstance(row, dict) and isinstance(row.get("plan"), dict) and isinstance(row.get("key"), str)
    return row if whole else None


def _kept(path: Path, machine: Mapping[str, Any]) -> dict[str, Any] | None:
    """A record of figures that depend on the machine; None where there is none, or it is of another."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return kept if kept["machine"] == machine else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _machine(sampler: Sampler) -> dict[str, Any]:
    return asdict(Machine.here(sampler.model.text_embedding.weight.device))


def plan_digest(plan: Mapping[str, Any]) -> str:
    """What the names of a plan's files end in, given its fields (as they are, or from JSON)."""
    return hashlib.blake2b(json.dumps(dict(plan)).encode(), digest_size=4).hexdigest()


def _name(plan: Plan) -> str:
    digest = plan_digest(asdict(plan))
    return f"blocks{plan.blocks}-steps{plan.steps}-guidance{plan.guidance:g}-{digest}"


def _strip(images: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one size side by side."""
    width, height = images[0].size
    strip = Image.new("RGB", (width * len(images), height))
    for index, image in enumerate(images):
        strip.paste(image, (index * width, 0))
    return strip
