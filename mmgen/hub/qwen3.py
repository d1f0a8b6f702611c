"""Qwen3 weights into the trunk and back. The blocks are the same block for block, so only names change.

What the trunk has not (sliding windows, attention biases, scaled rotary positions) is refused, never approximated.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import Qwen3Config

from mmgen.model.model import Model
from mmgen.model.trunk import TrunkConfig

_PREFIXES = {
    "model.embed_tokens.": "text_embedding.",
    "model.layers.": "trunk.layers.",
    "model.norm.": "trunk.norm.",
}
_HEAD = "lm_head.weight"


def trunk_config(config: Qwen3Config, **overrides: Any) -> TrunkConfig:
    """The trunk with the shape of a Qwen3 checkpoint. Raises ValueError for what the trunk has not."""
    rope: dict[str, Any] = dict(config.rope_parameters or {})
    if config.attention_bias:
        raise ValueError(
            "attention_bias is set: the trunk has no biases, use a Qwen3 checkpoint without them"
        )
    if config.use_sliding_window:
        raise ValueError("use_sliding_window is set: the trunk has one mask rule and no windows")
    if rope.get("rope_type", "default") != "default":
        raise ValueError(
            f"rope_type {rope['rope_type']!r}: only plain rotary positions (default) are supported"
        )
    if config.hidden_act != "silu":
        raise ValueError(f"hidden_act {config.hidden_act!r}: the trunk's feed-forward is SwiGLU (silu)")
    return TrunkConfig(
        width=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head_dim=config.head_dim,
        ffn_width=config.intermediate_size,
        rope_theta=float(rope.get("rope_theta", 10_000.0)),
        norm_eps=config.rms_norm_eps,
        tied=bool(config.tie_word_embeddings),
        **overrides,
    )


def qwen3_config(config: TrunkConfig, vocab_size: int) -> Qwen3Config:
    """The Qwen3 configuration of a trunk's text side."""
    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=config.width,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.ffn_width,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tied,
        attention_bias=False,
    )


def from_qwen3(model: Model, weights: Mapping[str, Tensor]) -> None:
    """Loads a Qwen3 state dict into the trunk and the text embedding and head; the picture side stays as it is.

    A feed-forward of the state stream's own starts as a copy of the text's. Embedding rows beyond the checkpoint's
    vocabulary (special tokens) stay as they are. Raises ValueError where names or shapes do not fit.
    """
    renamed = {_to_ours(name): tensor for name, tensor in weights.items()}
    if model.text_head is None:
        renamed.pop("text_head.weight", None)
    own = dict(model.named_parameters())
    text = {name for name in own if name.startswith(("trunk.", "text_"))}
    if model.config.state_ffn:
        renamed |= {name.replace(".mlp.", ".state_mlp."): t for name, t in renamed.items() if ".mlp." in name}
    missing, unexpected = sorted(text - set(renamed)), sorted(set(renamed) - text)
    if missing or unexpected:
        raise ValueError(f"not the weights of this trunk: missing {missing[:3]}, unexpected {unexpected[:3]}")
    for name, tensor in renamed.items():
        target = own[name].data
        if name.startswith("text_") and len(tensor) <= len(target):
            target = target[: len(tensor)]
        if tensor.shape != target.shape:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} in the checkpoint and {tuple(target.shape)} here"
            )
        target.copy_(tensor)


def to_qwen3(model: Model) -> dict[str, Tensor]:
    """The text side as a Qwen3 state dict. What the state stream alone uses has no place there and is left out."""
    names = {
        name: tensor for name, tensor in model.state_dict().items() if name.startswith(("trunk.", "text_"))
    }
    return {_to_theirs(name): tensor for name, tensor in names.items() if ".state_mlp." not in name}


def _to_ours(name: str) -> str:
    if name == _HEAD:
        return "text_head.weight"
    for theirs, ours in _PREFIXES.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def _to_theirs(name: str) -> str:
    if name == "text_head.weight":
        return _HEAD
    for theirs, ours in _PREFIXES.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name
