"""The benchmark of estimates: it measures what it says, and notices a model that is not the one that was predicted."""

from dataclasses import replace

import pytest
import torch

from benchmarks.estimate import Storages, cases, compare
from mmgen.sequence import PAD
from mmgen.training.run import build
from mmgen.training.synthetic import full_feed


def test_a_storage_counts_once_however_it_is_seen() -> None:
    storages, known = Storages(), torch.zeros(100)
    rows = torch.zeros(10, 10)
    for tensor in (rows, rows.T, rows[2:], torch.zeros(3), known[5:]):
        storages.add(tensor)
    assert storages.total() == 4 * (100 + 3 + 100)
    assert storages.total(without=[known]) == 4 * (100 + 3)


def test_rows_are_full_and_ratios_are_one() -> None:
    config = cases(quick=True)["imm"]
    small = replace(config, model=replace(config.model, width=32, num_layers=1, ffn_width=64))
    batch = full_feed(small, build(small), "dense").batch
    assert (batch.context.layout.document != PAD).all() and (batch.state.layout.document != PAD).all()
    found = compare(small)
    assert found["flops_over_counted"] == found["kept_over_measured"] == 1
    assert found["saved_over_measured"] == pytest.approx(1, rel=0.02)
