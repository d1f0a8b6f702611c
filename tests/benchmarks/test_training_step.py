"""The benchmark of training steps: powers of known growth, and steps of the lengths that it names."""

import numpy as np
import pytest

from benchmarks import harness
from benchmarks.training_step import AROUND, CAPTION, SIDE, Arguments, _step, grown


def test_powers_of_known_growth() -> None:
    lengths, drift = np.array([1, 2, 4, 8, 16]), np.array([1.0, 3.0, 1.5, 0.9, 2.0])[:, None]
    cubic = grown(lengths, 0.1 * lengths**3 * drift, seed=0)
    for estimate in cubic.values():
        assert (estimate.value, estimate.low, estimate.high) == pytest.approx((3, 3, 3))
    affine = grown(lengths, (8.0 + lengths) * np.ones_like(drift), seed=0)
    assert 0 < affine["power"].value < affine["last_power"].value == pytest.approx(np.log2(24 / 16))
    noisy = 0.1 * lengths * np.random.default_rng(0).lognormal(0, 0.3, (15, 5))
    found = grown(lengths, noisy, seed=0)["power"]
    assert found.low < 1 < found.high and found.high - found.low > 0.02 and found.num == 15


@pytest.mark.parametrize(
    ("axis", "expected"),
    [
        ("context", (0.8, 1.0)),  # beside a picture that does not grow
        ("pictures", (1.0, 1.5)),  # each reads those before it
        ("particles", (0.05, 0.9)),  # of one context
    ],
)
def test_steps_of_an_axis_grow_as_their_documents_do(axis, expected: tuple[float, float]) -> None:
    lengths = {"context": (128, 512), "pictures": (2, 4), "particles": (2, 4)}[axis]
    (step, few), (_, many) = (_step(axis, length, 0) for length in lengths)
    taken = step()
    assert taken.finite
    if axis == "pictures":
        noisy = 2 * SIDE**2
        assert taken.seen["tokens"] == 1 + 2 * (CAPTION + 2) + SIDE**2 + noisy
    if axis == "context":
        assert taken.seen["tokens"] == 128 + SIDE**2
    low, high = expected
    assert low < harness.power(lengths, [few, many]) < high


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"widths": (100,)}, r"widths \(100,\) must be multiples of 64"),
        ({"pictures": (4, 2)}, r"pictures \(4, 2\) must be two or more numbers that grow"),
        ({"context": (AROUND, 256)}, r"context \(3, 256\) must be above 3"),
        ({"particles": (1, 2)}, r"particles \(1, 2\) must be at least 2"),
    ],
)
def test_sizes_that_make_no_step_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Arguments(**wrong)
