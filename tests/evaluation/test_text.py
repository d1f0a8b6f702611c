"""Bits per byte of known distributions."""

import math

import pytest
import torch

from mmgen.evaluation.text import bits_per_byte


def test_uniform_bytes_cost_eight_bits() -> None:
    sizes = torch.tensor([3, 10, 7])
    estimate = bits_per_byte(sizes * math.log(256), sizes, ("uniform",))
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((8, 8, 8))


def test_a_fair_coin_costs_its_entropy_whatever_the_tokens() -> None:
    """Documents of n tokens of two bytes each, every token one of two: half a bit a byte."""
    tokens = torch.tensor([4, 9, 2, 30])
    assert bits_per_byte(tokens * math.log(2), 2 * tokens, ("coin",)).value == pytest.approx(0.5)


def test_interval_is_over_documents() -> None:
    nats, sizes = torch.rand(200) * 100, torch.full((200,), 50)
    narrow, wide = bits_per_byte(nats, sizes, ("a",)), bits_per_byte(nats[:20], sizes[:20], ("a",))
    assert narrow.low < narrow.value < narrow.high
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_an_empty_document_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one byte"):
        bits_per_byte(torch.tensor([1.0]), torch.tensor([0]), ("none",))
