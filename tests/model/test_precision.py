"""Products that stay exact whatever a training or a user allows to float32."""

from collections import Counter

import pytest
import torch
from torch import nn

from mmgen.data.pack import PackConfig, Packer
from mmgen.model.model import plan_batch
from mmgen.model.precision import float32_products
from mmgen.objectives import IMM, IMMConfig
from mmgen.objectives.draw import draw_state
from mmgen.training.feed import Feed
from mmgen.training.losses import compute_losses
from mmgen.training.run import Parts
from tests.parts import documents, modalities, model, tokenizer


def test_times_and_heads_are_multiplied_exactly_in_bf16_too():
    objective, net = IMM(IMMConfig()), model(dtype=torch.float32)
    packer = Packer(PackConfig(1, 128, 128), modalities(), objective.grouping)
    assert packer.add(*documents(4))
    batch = packer.finish()
    feed = Feed(batch, draw_state(batch, modalities(), objective, 0), plan_batch(batch, "dense"))
    asked = Counter()

    def record(module: nn.Module, *_) -> None:
        asked[names[module], torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")] += 1

    names = {
        module: name.split(".")[0] for name, module in net.named_modules() if isinstance(module, nn.Linear)
    }
    for module in names:
        module.register_forward_hook(record)
    parts = Parts(tokenizer(), modalities(), net, objective)
    with float32_products("high"):
        compute_losses(parts, feed, "bf16", torch.device("cpu"))
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == "highest"
    found = {name: {key[1:] for key in asked if key[0] == name} for name in {key[0] for key in asked}}
    exact = {("highest", False)}
    assert {name: found.pop(name) for name in ("time_embedding", "modulation", "heads")} == {
        "time_embedding": exact,
        "modulation": exact,
        "heads": exact,
    }
    assert found.pop("trunk") == {("high", True)}, "the control: what is not kept exact"


def test_the_switch_is_put_back_after_an_error():
    with pytest.raises(ZeroDivisionError), float32_products("high"):
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == "highest"
