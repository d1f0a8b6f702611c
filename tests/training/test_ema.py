"""The weight average: its recursion, that early averages are of use, and that swapping gives everything back."""

import pytest
import torch
from torch import nn

from mmgen.training.ema import Ema, decay_at


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


def test_updates_follow_the_recursion() -> None:
    model = nn.Linear(2, 2)
    ema = Ema(model, decay=0.5)
    expected = model.weight.detach().clone()
    for n in range(8):
        with torch.no_grad():
            model.weight.add_(1.0)
        ema.update(model, n)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(ema.state_dict()["weight"], expected)


def test_early_averages_forget_the_random_start() -> None:
    model = nn.Linear(1, 1)
    warm = Ema(model, decay=0.9999)
    constant = model.weight.detach().clone()
    nn.init.zeros_(model.weight)
    with torch.no_grad():
        model.weight += 10
    for n in range(20):
        warm.update(model, n)
        constant.lerp_(model.weight.detach(), 1 - 0.9999)
    assert abs(float(warm.state_dict()["weight"]) - 10) < 1e-3
    assert abs(float(constant) - 10) > 8, "without the warm-up it would still be the start"
    assert decay_at(0.9999, 0) == 0.1 and decay_at(0.9999, 10**6) == 0.9999


def test_averages_are_float32_of_a_bfloat16_model_and_move_where_bfloat16_would_not() -> None:
    model = nn.Linear(4, 4).bfloat16()
    nn.init.ones_(model.weight)
    ema = Ema(model, decay=0.999)
    with torch.no_grad():
        model.weight += 0.0078125  # one bfloat16 step at 1
    ema.update(model, 10**6)
    average = ema.state_dict()["weight"]
    assert average.dtype == torch.float32 and bool((average > 1).all())
    assert Ema(nn.Linear(1, 1).double(), 0.9).state_dict()["weight"].dtype == torch.float64


def test_tied_weights_have_one_average_and_buffers_are_followed() -> None:
    model = Tied()
    ema = Ema(model, decay=0.9)
    state = ema.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert state["head.weight"] is state["embed.weight"]
    model.norm(torch.randn(8, 3))
    with torch.no_grad():
        model.embed.weight.add_(1.0)
    before = state["embed.weight"].clone()
    ema.update(model, 100)
    assert state["norm.num_batches_tracked"] == 1
    torch.testing.assert_close(state["embed.weight"], before + 0.1)  # moved once, not once a name


def test_swapping_uses_the_averages_and_restores_bit_for_bit_also_after_an_error() -> None:
    model = Tied().bfloat16()
    ema = Ema(model, decay=0.9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    averages = {name: tensor.clone() for name, tensor in ema.state_dict().items()}
    with pytest.raises(RuntimeError, match="inside"), ema.swapped(model):
        assert torch.equal(model.embed.weight, averages["embed.weight"].bfloat16())
        raise RuntimeError("inside")
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, averages[name]) for name, tensor in ema.state_dict().items())


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan")])
def test_a_decay_outside_its_range_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        Ema(nn.Linear(1, 1), decay)
