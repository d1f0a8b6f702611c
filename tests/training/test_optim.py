"""Learning-rate schedules, parameter groups, and an optimizer whose state is whole before the first step."""

import math

import pytest
import torch
from torch import nn

from mmgen.training.checkpoint import optimizer_state
from mmgen.training.optim import OptimConfig, Together, build_optimizer, learning_rate, set_learning_rate


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(7, 4)
        self.proj = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.unused = nn.Linear(4, 2)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)

    def loss(self) -> torch.Tensor:
        return self.norm(self.proj(self.embed_tokens(torch.arange(7)))).square().mean().sin()


def rates(total: int, **changes: object) -> list[float]:
    config = OptimConfig(lr=1.0, **changes)  # pyright: ignore[reportArgumentType]
    return [learning_rate(config, step, total) for step in range(total)]


def test_warm_up_is_linear_and_wastes_no_step() -> None:
    for schedule in ("constant", "cosine", "wsd"):
        values = rates(100, warmup_steps=4, schedule=schedule)
        assert values[:5] == [0.25, 0.5, 0.75, 1.0, pytest.approx(1.0, abs=1e-3)]
        assert min(values) > 0
    assert rates(3, warmup_steps=0, schedule="constant") == [1.0, 1.0, 1.0]


def test_wsd_is_stable_and_then_falls_linearly_to_its_end() -> None:
    values = rates(100, warmup_steps=10, schedule="wsd", decay_share=0.2, final_lr_share=0.5)
    assert values[9:81] == [1.0] * 72
    assert values[80:] == pytest.approx([1 - 0.5 * i / 20 for i in range(20)])
    assert rates(100, warmup_steps=10, schedule="wsd", decay_share=0.0)[10:] == [1.0] * 90
    assert rates(10, warmup_steps=4, schedule="wsd", decay_share=1.0)[3:] == pytest.approx(
        [1.0, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    )


def test_cosine_passes_half_way_at_the_middle() -> None:
    values = rates(101, warmup_steps=1, schedule="cosine")
    assert values[51] == pytest.approx(0.5)
    assert values[26] == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert learning_rate(OptimConfig(schedule="cosine", final_lr_share=0.1), 500, 500) == pytest.approx(1e-4)


def test_no_step_beyond_the_total_leaves_the_range() -> None:
    for schedule in ("constant", "cosine", "wsd"):
        config = OptimConfig(schedule=schedule)
        assert 0 <= learning_rate(config, 10**6, 1000) <= config.lr
        assert 0 < learning_rate(config, 0, 1) <= config.lr  # a run shorter than its warm-up


def test_decay_acts_on_matrices_but_embeddings() -> None:
    model = Model()
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.3, no_decay=("embed",)))
    names = {id(p): name for name, p in model.named_parameters()}
    by_decay = {g["weight_decay"]: {names[id(p)] for p in g["params"]} for g in optimizer.param_groups}
    assert by_decay == {
        0.3: {"proj.weight", "unused.weight"},
        0.0: {"embed_tokens.weight", "proj.bias", "norm.weight", "norm.bias", "unused.bias"},
    }


def test_state_is_whole_before_the_first_step_and_changes_nothing() -> None:
    """Against AdamW with lazy state: the same weights after three steps; parameters nobody uses are in the state."""
    torch.manual_seed(1)
    model = Model()
    torch.manual_seed(1)
    lazy_model = Model()
    optimizer = build_optimizer(model, OptimConfig(lr=0.1, weight_decay=0.0))
    trained = [p for p in lazy_model.parameters() if p.requires_grad]
    lazy = Together(
        torch.optim.AdamW(trained, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, fused=True)
    )
    state = optimizer_state(model, optimizer)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert {name.removeprefix("state.").rpartition(".")[0] for name in state} == set(trainable)
    assert not any(bool(tensor.any()) for tensor in state.values())
    for _ in range(3):
        for m, o in ((model, optimizer), (lazy_model, lazy)):
            m.loss().backward()
            o.step()
            o.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), lazy_model.parameters(), strict=True))
    assert not any("unused" in name for name in optimizer_state(lazy_model, lazy)), (
        "lazy state would have sufficed"
    )
    assert state["state.proj.weight.step"] == 3 and state["state.unused.weight.step"] == 0


def test_the_rate_reaches_every_group() -> None:
    optimizer = build_optimizer(Model(), OptimConfig())
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"lr": 0.0}, "lr must be above 0, is 0.0"),
        ({"betas": (0.9, 1.0)}, "betas must be"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, is -1"),
        ({"decay_share": 1.5}, "decay_share must be between 0 and 1, is 1.5"),
        ({"no_decay": ("(",)}, "no regular expression"),
    ],
)
def test_settings_outside_their_range_are_refused(changes: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        OptimConfig(**changes)


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to train"):
        build_optimizer(nn.Linear(1, 1).requires_grad_(False), OptimConfig())


def test_muon_moves_the_matrices_of_the_blocks_and_adamw_everything_else() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4))])
    model.head = nn.Linear(4, 3)
    optimizer = build_optimizer(model, OptimConfig(matrices="muon", lr=0.01, weight_decay=0.0))
    adamw, muon = optimizer.parts
    assert [p.shape for group in muon.param_groups for p in group["params"]] == [(4, 6)]
    assert sum(p.numel() for group in adamw.param_groups for p in group["params"]) == 4 + 8 + 15
    assert all(not value.any() for state in optimizer.state.values() for value in state.values()), (
        "made as zeros"
    )
    matrix = model.layers[0][0].weight
    before = matrix.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    # orthogonalized: all singular values of the update are alike, which no gradient's and no AdamW step's are
    values = torch.linalg.svdvals(matrix.detach() - before)
    assert values.max() / values.min() < 2
    assert "state.layers.0.0.weight.momentum_buffer" in optimizer_state(model, optimizer)
