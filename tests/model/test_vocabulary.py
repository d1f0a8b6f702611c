"""Log-probabilities of tokens: the same whole or a part at a time, and never narrowed."""

import pytest
import torch
import torch.nn.functional as F

from mmgen.model import vocabulary as module
from mmgen.model.vocabulary import Vocabulary
from mmgen.rng import keyed_torch
from mmgen.sequence import NO_LABEL

V, WIDTH = 50, 12


def drawn(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = keyed_torch("vocabulary")
    weight = torch.randn(V, WIDTH, dtype=torch.float64, generator=draw).to(dtype)
    hidden = torch.randn(*shape, WIDTH, dtype=torch.float64, generator=draw).to(dtype)
    tokens = torch.randint(V, shape, generator=draw)
    tokens.view(-1)[::7] = NO_LABEL
    return weight.requires_grad_(), hidden.requires_grad_(), tokens


@pytest.fixture(params=["of torch", "by hand"])
def _either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own loss, which came with 2.13, and what stands in for it before."""
    if request.param == "by hand":
        monkeypatch.delattr("torch.nn.LinearCrossEntropyOptions")
        monkeypatch.delattr(F, "linear_cross_entropy")
    elif not hasattr(F, "linear_cross_entropy"):
        pytest.skip(f"torch {torch.__version__} has none")


@pytest.mark.usefixtures("_either")
@pytest.mark.parametrize("held", [1, 4 * V, 7 * V, 10**6])  # a row, parts that do and do not fit, all at once
@pytest.mark.parametrize("shape", [(20,), (5, 4)])
def test_parts_are_the_whole(held: int, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "HELD", held)
    weight, hidden, tokens = drawn(torch.float64, shape)
    expected = (hidden @ weight.T).log_softmax(-1).gather(-1, tokens.clamp(min=0)[..., None]).squeeze(-1)
    expected = expected.where(tokens != NO_LABEL, 0.0)
    found = Vocabulary(lambda ids: weight[ids], weight).log_prob(hidden, tokens)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.rand(shape, dtype=torch.float64, generator=keyed_torch("upstream"))
    gradients = [torch.autograd.grad((each * upstream).sum(), (weight, hidden)) for each in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("_either")
@pytest.mark.parametrize("held", [4 * V, 10**6])
def test_autocast_narrows_nothing(held: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "HELD", held)
    weight, hidden, tokens = drawn(torch.float32, (20,))
    vocabulary = Vocabulary(lambda ids: weight[ids], weight)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = vocabulary.log_prob(hidden.bfloat16(), tokens)
        logits = vocabulary.logits(hidden.bfloat16())
    assert narrow.dtype == logits.dtype == torch.float32
    monkeypatch.undo()
    exact = vocabulary.log_prob(hidden.bfloat16().float(), tokens)
    torch.testing.assert_close(narrow, exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, hidden.bfloat16().float() @ weight.T)


@pytest.mark.usefixtures("_either")
def test_no_tokens_are_no_trouble():
    weight, hidden, tokens = drawn(torch.float32, (0,))
    found = Vocabulary(lambda ids: weight[ids], weight).log_prob(hidden, tokens)
    found.sum().backward()
    assert found.shape == (0,) and weight.grad is not None and not weight.grad.any()
