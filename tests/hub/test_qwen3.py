"""The trunk is Qwen3: same logits from the same weights, in pieces or at once, there and back."""

import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from mmgen.hub.qwen3 import from_qwen3, qwen3_config, to_qwen3, trunk_config
from mmgen.model.attention import plan_attention
from mmgen.model.model import Model
from mmgen.model.trunk import TrunkConfig
from mmgen.sequence import Layout, Stream
from tests.parts import modalities

SHAPES = [
    {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "tie_word_embeddings": True},
    {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": False},
    {"num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 10, "tie_word_embeddings": True},
]


def reference(shape: dict) -> Qwen3ForCausalLM:
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=3,
        rope_parameters={"rope_type": "default", "rope_theta": 7_000.0},
        **shape,
    )
    network = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def ours(network: Qwen3ForCausalLM, **overrides: object) -> Model:
    model = Model(trunk_config(network.config, **overrides), modalities(), network.config.vocab_size)
    from_qwen3(model, network.state_dict())
    return model.eval()


def text(ids: Tensor, start: int = 0) -> Stream:
    rank = torch.arange(start, start + ids.shape[1]).expand(ids.shape)
    layout = Layout(
        torch.arange(len(ids))[:, None].expand(ids.shape), rank, rank, torch.ones_like(ids, dtype=torch.bool)
    )
    return Stream(torch.zeros_like(ids), ids, {}, rank[..., None].expand(-1, -1, 3), layout)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", ["dense", "runs"])
@torch.no_grad()
def test_logits_equal_transformers(shape: dict, backend: str):
    network = reference(shape)
    model = ours(network)
    ids = torch.randint(0, 61, (3, 17))
    stream = text(ids)
    hidden, _ = model.expand(stream, plan_attention(stream.layout, stream.layout, backend))
    torch.testing.assert_close(model.logits(hidden), network(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_logits_with_a_cache_equal_transformers_with_its_cache(shape: dict):
    network = reference(shape)
    model = ours(network)
    ids = torch.randint(0, 61, (2, 12))
    first = network(ids[:, :7], use_cache=True)
    expected = network(ids[:, 7:], past_key_values=first.past_key_values).logits
    head, tail = text(ids[:, :7]), text(ids[:, 7:], start=7)
    _, past = model.expand(head, plan_attention(head.layout, head.layout, "dense"))
    keys = Layout.concat([head.layout, tail.layout])
    hidden, _ = model.expand(tail, plan_attention(tail.layout, keys, "dense"), past)
    torch.testing.assert_close(model.logits(hidden), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("state_ffn", [False, True])
def test_exports_back_to_the_same_weights_and_config(shape: dict, state_ffn: bool):
    network = reference(shape)
    model = ours(network, state_ffn=state_ffn)
    again = Qwen3ForCausalLM(qwen3_config(model.config, 61))
    again.load_state_dict(to_qwen3(model), strict=not model.config.tied)
    again.tie_weights()
    for name, tensor in network.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert trunk_config(again.config, state_ffn=state_ffn) == model.config


def test_a_state_feed_forward_starts_as_a_copy():
    model = ours(reference(SHAPES[0]), state_ffn=True)
    for block in model.trunk.layers:
        assert torch.equal(block.state_mlp.up_proj.weight, block.mlp.up_proj.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}, "sliding"),
        (
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 1e4,
                    "factor": 2.0,
                    "original_max_position_embeddings": 64,
                }
            },
            "yarn",
        ),
        ({"hidden_act": "gelu"}, "gelu"),
    ],
)
def test_what_the_trunk_has_not_is_refused(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        trunk_config(Qwen3Config(**change))


def test_weights_of_another_shape_are_refused_by_name():
    network = reference(SHAPES[0])
    model = Model(
        TrunkConfig(width=32, num_layers=3, num_heads=4, num_kv_heads=4, head_dim=8, ffn_width=48),
        modalities(),
        61,
    )
    with pytest.raises(ValueError, match="mlp.*56.*48"):
        from_qwen3(model, network.state_dict())
