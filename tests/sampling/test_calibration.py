"""The fit of seconds: it finds coefficients that are known, refuses what it was not made for, and is kept."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mmgen.objectives import FlowMatching, FlowMatchingConfig
from mmgen.sampling.calibration import Calibration, Machine, features
from mmgen.sampling.plan import Plan
from mmgen.sampling.predict import ModelFacts, Work, Written, predict_pictures, predict_texts
from mmgen.sampling.probes import Probe, calibrate, default_probes, fastest
from mmgen.sampling.sampler import Sampler
from tests.parts import TINY, modalities, model

CPU = torch.device("cpu")
FACTS = ModelFacts(TINY, 300, {"image": 48})
HERE = Machine.here(CPU)


def pictures(num: int, grid: tuple[int, int] = (4, 4), prompt: int = 3, **plan: object) -> Work:
    return predict_pictures(FACTS, Plan(**plan), [prompt] * num, grid)


def texts(num: int, context: int, tokens: int) -> Work:
    plan = Plan(max_tokens=tokens)
    return predict_texts(FACTS, plan, [context] * num, [Written.evenly(tokens)] * num, picture_tokens=num % 3)


def works(seed: int, num: int) -> list[Work]:
    draw = np.random.default_rng(seed)

    def pick(*choices: int) -> int:
        return int(draw.choice(choices))

    def one(kind: int) -> Work:
        rows = pick(1, 2, 5, 16, 64, 100)
        if kind % 3 == 0:
            return texts(rows, pick(2, 9, 30), pick(1, 4, 20, 50))
        guidance, side = float(pick(1, 2)), pick(4, 6, 10)
        return pictures(
            rows, (side, side), pick(0, 5, 30), steps=pick(1, 3, 8), blocks=pick(1, 2, 4), guidance=guidance
        )

    return [one(i) for i in range(num)]


TRUE = {
    "batches": 2e-3, "decoded_tokens": 4e-5, "encoded_tokens": 6e-5, "read_calls": 3e-3, "read_rows": 2e-4,
    "read_flops": 3e-11, "refine_calls": 5e-3, "refine_flops": 2e-11, "scores": 1e-8, "decode_calls": 4e-3,
    "decode_single_calls": 2e-3, "decode_flops": 6e-11, "text_flops": 5e-11,
}  # fmt: skip


def true_seconds(each: Sequence[Work]) -> list[float]:
    return [sum(TRUE[name] * amount for name, amount in features(work).items()) for work in each]


def errors(calibration: Calibration, seen: Sequence[Work], seconds: Sequence[float]) -> np.ndarray:
    return np.array([calibration.seconds(work) / s - 1 for work, s in zip(seen, seconds, strict=True)])


def test_coefficients_that_made_the_seconds_are_found():
    seen = works(0, 120)
    calibration = Calibration.fit(HERE, seen, true_seconds(seen))
    assert calibration.seconds_per == pytest.approx(TRUE, rel=1e-5)
    unseen = works(1, 40)
    assert np.abs(errors(calibration, unseen, true_seconds(unseen))).max() < 1e-6


def test_noisy_timings_predict_others_and_shuffled_ones_do_not():
    """The negative control: the same seconds, each of another call."""
    draw = np.random.default_rng(2)
    seen, unseen = works(0, 60), works(1, 40)
    noisy = np.array(true_seconds(seen)) * (1 + 0.1 * np.abs(draw.standard_normal(60)))
    found, wrong = (
        np.median(np.abs(errors(Calibration.fit(HERE, seen, seconds), unseen, true_seconds(unseen))))
        for seconds in (noisy.tolist(), draw.permutation(noisy).tolist())
    )
    assert found < 0.15 < 0.5 < wrong


def test_no_coefficient_is_below_zero():
    """A constant that plain least squares finds negative, because long calls cost more than their share."""
    seen = [pictures(1, steps=steps) for steps in (1, 2, 4, 8, 16)]
    seconds = [work.cost.nfe**1.5 / 100 for work in seen]
    found = Calibration.fit(HERE, seen, seconds).seconds_per
    assert min(found.values()) >= 0 and max(found.values()) > 0


def test_it_is_kept_and_refused_elsewhere(tmp_path: Path):
    seen = works(0, 60)
    calibration = Calibration.fit(HERE, seen, true_seconds(seen))
    path = tmp_path / "calibration.json"
    calibration.save(path)
    assert Calibration.load(path, CPU) == calibration
    assert [file.name for file in tmp_path.iterdir()] == ["calibration.json"], "nothing is left beside it"
    for name, value in (("processor", "abacus"), ("threads", HERE.threads + 1), ("device", "a GPU")):
        record = json.loads(path.read_text())
        record["machine"][name] = value
        (tmp_path / "other.json").write_text(json.dumps(record))
        with pytest.raises(ValueError, match=f"was made on .*{value}.* calibrate here"):
            Calibration.load(tmp_path / "other.json", CPU)
    with pytest.raises(ValueError, match="missing: calibrate this model on this machine first"):
        Calibration.load(tmp_path / "none.json", CPU)


def test_other_models_and_other_kinds_of_work_are_refused():
    seen = [pictures(num, steps=steps) for num in (1, 4) for steps in (1, 2)]
    calibration = Calibration.fit(HERE, seen, true_seconds(seen))
    with pytest.raises(ValueError, match="calibrated without decode_flops, decode_single_calls"):
        calibration.seconds(texts(1, 5, 4))
    other = replace(FACTS, vocab_size=301)
    with pytest.raises(ValueError, match="of another model"):
        calibration.seconds(predict_pictures(other, Plan(), [3], (4, 4)))
    with pytest.raises(ValueError, match="of one model"):
        Calibration.fit(HERE, [*seen, predict_pictures(other, Plan(), [3], (4, 4))], [1.0] * 5)


def test_a_real_sampler_is_calibrated():
    """That probes say exactly what they do, and that what is fitted has the order of what was timed."""
    draws = Sampler(model(dtype=torch.float32), modalities(), FlowMatching(FlowMatchingConfig()), (16, 16))
    for probe in default_probes(draws, (1, 3)):
        assert replace(probe.run().cost, seconds=0.0) == probe.work.cost
    calibration = calibrate(draws, (1, 3), repeats=1)
    probe = Probe(draws, "generate", Plan(steps=20), 2)
    (took,) = fastest([probe.run], 3)
    assert 0.2 < calibration.seconds(probe.work) / took < 5
    with pytest.raises(ValueError, match=r"batch_sizes \(2,\) must be two different numbers"):
        default_probes(draws, (2,))
