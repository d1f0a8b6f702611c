"""Seconds of a plan before it is drawn: a line through a few timed calls of one model on one machine.

A call's seconds are a sum of non-negative coefficients times what `Work` says it does (`features`). Where a model is
small the constants of a call or a row dominate, where it is large the operations do; both are in the sum.
"""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from mmgen.config import from_mapping
from mmgen.files import write_text
from mmgen.sampling.predict import ModelFacts, Work

Features = Mapping[str, float]


def features(work: Work) -> dict[str, float]:
    """What `work` does, in the units that seconds are proportional to; those that it does not have are absent.

    A call of the network has a constant (launches, the session's bookkeeping), and the operations of its products;
    attention, whose speed is another, counts scored keys apart. Rows that are read have a constant too, of which
    refining has none, and a text's pass none that its operations do not have in one. A pass over one token in all is
    a call of its own kind: its products are of a matrix and a vector, for which libraries have other kernels.
    """
    found: dict[str, float] = {}

    def add(name: str, amount: float) -> None:
        if amount:
            found[name] = found.get(name, 0.0) + amount

    for batch in work.batches:
        add("batches", 1)
        add("decoded_tokens", batch.decoded)
        add("encoded_tokens", batch.encoded)
        for call in batch.calls:
            kind = "read" if call.kind in ("prefill", "commit", "score") else call.kind
            single = kind == "decode" and call.rows * call.tokens == 1
            add("decode_single_calls" if single else f"{kind}_calls", call.times)
            if kind == "read":
                add("read_rows", call.times * call.rows)
            scores = call.num_tokens * call.keys
            add(f"{kind}_flops", call.trunk_flops(work.facts) - score_flops(work.facts, scores))
            add("scores", scores)
            add("text_flops", call.text_flops(work.facts))
    return found


def score_flops(facts: ModelFacts, scores: float) -> float:
    """Operations of attention for so many pairs of a token and a key, in all layers."""
    trunk = facts.trunk
    return 4.0 * trunk.num_layers * trunk.num_heads * trunk.head_dim * scores


@dataclass(frozen=True)
class Machine:
    """What seconds depend on beside the work. `threads` are torch's on the CPU."""

    processor: str
    device: str
    threads: int

    @classmethod
    def here(cls, device: torch.device) -> "Machine":
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return cls(processor(), name, torch.get_num_threads())


def processor() -> str:
    """The name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"
    )


@dataclass(frozen=True)
class Calibration:
    """Seconds a unit of each feature, of one model on one machine."""

    machine: Machine
    facts: ModelFacts
    seconds_per: dict[str, float]

    @classmethod
    def fit(cls, machine: Machine, works: Sequence[Work], seconds: Sequence[float]) -> "Calibration":
        """The coefficients, none below 0, with the least sum of squared *relative* errors of the timed works.

        Raises ValueError for works of several models, and for none.
        """
        if not works or any(work.facts != works[0].facts for work in works):
            raise ValueError(f"{len(works)} works: a calibration is of one model, and of one work at least")
        rows = [features(work) for work in works]
        from scipy import optimize  # of the extra `eval`; a calibration is used without it

        names = sorted({name for row in rows for name in row})
        matrix = np.array([[row.get(name, 0.0) for name in names] for row in rows])
        matrix /= np.array(seconds)[:, None]
        scale = matrix.max(0)  # features are of very different sizes
        found = optimize.nnls(matrix / scale, np.ones(len(rows)))[0] / scale
        return cls(machine, works[0].facts, dict(zip(names, found.tolist(), strict=True)))

    def seconds(self, work: Work) -> float:
        """What `work` will take, as the sampler counts its seconds: with the autoencoder, after a first call.

        Raises ValueError for work of another model, or of a kind that was not timed.
        """
        if work.facts != self.facts:
            raise ValueError(
                f"this calibration is of another model ({self.facts}); calibrate this one ({work.facts})"
            )
        found = features(work)
        if missing := sorted(found.keys() - self.seconds_per.keys()):
            raise ValueError(f"calibrated without {', '.join(missing)}: calibrate with calls that have them")
        return sum(self.seconds_per[name] * amount for name, amount in found.items())

    def save(self, path: Path) -> None:
        """Writes JSON; the file appears whole or not at all."""
        write_text(path, json.dumps(asdict(self), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path, device: torch.device) -> "Calibration":
        """Raises ValueError where the file is missing, and where it is of another machine or number of threads."""
        if not path.is_file():
            raise ValueError(f"{path} is missing: calibrate this model on this machine first")
        found, here = from_mapping(json.loads(path.read_text(encoding="utf-8")), cls), Machine.here(device)
        if found.machine != here:
            raise ValueError(f"{path} was made on {found.machine}, and this is {here}: calibrate here")
        return found
