"""Predicted seconds of every plan of a surface against those that `mmgen tradeoff` timed, thoughts and candidates too.

Of a run that `mmgen tradeoff` has measured and `mmgen cost RUN --calibrate` has calibrated, on this machine, at two
different times. A picture is drawn alone, after a prompt of as many tokens as the surface's prompts have on average.
Rows are kinds of plans: `error` is the share by which a prediction is off, `bias` whether above or below.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks import harness
from benchmarks.checkpoint_surface import refuse_seeds
from mmgen.config import from_mapping
from mmgen.evaluation.store import LATENCY, SUMMARY
from mmgen.sampling.calibration import Calibration, Machine
from mmgen.sampling.plan import Plan
from mmgen.sampling.predict import predict_pictures
from mmgen.training.run import load


@dataclass(frozen=True)
class Arguments(harness.Arguments):
    run: Path = Path("runs/surface")
    """Whose surface is in its folder tradeoff, and its calibration beside it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_seeds(self)
        for name in (f"tradeoff/{LATENCY}", f"tradeoff/{SUMMARY}", "calibration.json"):
            if not (self.run / name).is_file():
                raise ValueError(
                    f"{self.run / name} is missing: `mmgen tradeoff` and `mmgen cost --calibrate` write it"
                )


def measure(arguments: Arguments) -> list[harness.Row]:
    sampler = load(arguments.run)
    device = sampler.model.text_embedding.weight.device
    calibration = Calibration.load(arguments.run / "calibration.json", device)
    timed, known = (
        json.loads((arguments.run / "tradeoff" / name).read_text(encoding="utf-8"))
        for name in (LATENCY, SUMMARY)
    )
    if timed["machine"] != asdict(Machine.here(device)):
        raise ValueError(f"{arguments.run} was timed on {timed['machine']}, not on this machine")
    tokens = round(np.mean([len(sampler.text.tokenizer.encode(prompt)) for prompt in known["prompts"]]))
    grid = sampler.image.token_grid(*sampler.size)
    errors: dict[tuple[bool, int], list[float]] = {}
    for each in timed["plans"]:
        plan = from_mapping(each["plan"], Plan)
        predicted = calibration.seconds(predict_pictures(sampler.facts, plan, [tokens], grid))
        errors.setdefault((plan.thinking > 0, plan.candidates), []).append(predicted / each["seconds"] - 1)
    everything = [error for own in errors.values() for error in own]
    kinds = [({"thoughts": thoughts, "candidates": num}, own) for (thoughts, num), own in errors.items()]
    return [_row(name, np.array(own)) for name, own in [*kinds, ({"plans": "all"}, everything)]]


def _row(name: dict[str, object], errors: np.ndarray) -> harness.Row:
    off = np.abs(errors)
    return {
        **name,
        "num": len(errors),
        "error_median": float(np.median(off)),
        "error_90": float(np.quantile(off, 0.9)),
        "bias": float(np.median(errors)),
    }


if __name__ == "__main__":
    harness.run("cost_of_surface", Arguments, measure, __doc__)
