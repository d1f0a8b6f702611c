"""Draws are keyed by counters and by weight."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmgen.rng import draw_index, keyed_numpy


@given(weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=6), key=st.integers(0, 1000))
def test_an_index_is_drawn_as_numpys_choice_draws_it(weights: list[float], key: int):
    shares = np.array(weights) / sum(weights)
    assert draw_index(weights, keyed_numpy(key)) == keyed_numpy(key).choice(len(weights), p=shares)


def test_indices_come_by_their_weight_and_never_without_one():
    draw = keyed_numpy("index")
    found = np.bincount([draw_index([1.0, 0.0, 3.0], draw) for _ in range(4000)], minlength=3) / 4000
    assert found[1] == 0 and found[2] == pytest.approx(0.75, abs=0.03)
