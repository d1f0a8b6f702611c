"""The shared transformer: a Qwen3 block for block, with the two verbs of the design.

`expand` reads clean tokens and returns the keys and values that later tokens read. `refine` reads noisy tokens, with a
time, against such keys and values, and leaves none behind. `forward` does both, block by block, and is the only entry
that training takes; a target pass is a second `refine` in it, without gradient. The trunk has no dropout.

Shape letters: B rows, L tokens (C of the context, S of the state), P tokens of a cache, W width, H heads, K key/value
heads, E head dim, I instances, N blocks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import embedding as gather
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from mmgen.model.attention import Attend
from mmgen.model.rope import rope_angles, rotate
from mmgen.model.time import TimeConditioning

KeyValue = tuple[Float[Tensor, "B L K E"], Float[Tensor, "B L K E"]]


class Growing(Protocol):
    """A block's part of a cache that is written in place. Never under a gradient: it holds what was written last."""

    def extend(self, k: Float[Tensor, "B L K E"], v: Float[Tensor, "B L K E"], /) -> KeyValue:
        """Takes in the keys and values of new tokens where room was made for them, and returns all that there are."""
        ...


Past = KeyValue | Growing
"""what came before the tokens that a block reads"""

Checkpointing = Literal["none", "selective", "full"]
# What selective checkpointing keeps: the results of matrix products and of attention, which cost most to make again.
_KEPT = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.higher_order.flex_attention,  # seen in compiled blocks alone
]


@dataclass(frozen=True)
class TrunkConfig:
    """Sizes of the trunk, named for what they are; see mmgen/hub for the names of Hugging Face."""

    width: int = 256
    num_layers: int = 6
    num_heads: int = 4
    num_kv_heads: int = 4
    head_dim: int = 64
    ffn_width: int = 768
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    tied: bool = True
    """whether the text head is the text embedding"""
    time: TimeConditioning = "adaln_single"
    time_scale: float = 1000.0
    """what times are multiplied by: waves as short as 2 pi / time_scale (IMM, arXiv 2503.07565, section 5: 1000)"""
    modulation_norm: bool = False
    """divide shifts, scales and gates by their root mean square (Terminal Velocity Matching, arXiv 2511.19797)"""
    state_ffn: bool = False
    """feed-forward weights of their own for the state stream"""

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads {self.num_kv_heads} does not divide num_heads {self.num_heads}")
        if not self.time_scale > 0:
            raise ValueError(f"time_scale {self.time_scale} must be positive")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary positions turn pairs, so make it even")

    @property
    def modulates(self) -> bool:
        """Whether the time scales and shifts what enters the blocks and the head, rather than being added to tokens."""
        return self.time != "add"


def narrow(x: Tensor) -> Tensor:
    """What autocast would make of `x` in a matrix product; here once for all the products that share it."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


class RMSNorm(nn.RMSNorm):
    """Computed in float32 at least whatever comes in, and the weights are (in bfloat16 where ranks share them so)."""

    def forward(self, x: Float[Tensor, "... W"]) -> Float[Tensor, "... W"]:
        if x.dtype == self.weight.dtype and x.dtype in (torch.float32, torch.float64):
            return super().forward(x)
        # torch has no fused norm for two dtypes
        wide = torch.promote_types(x.dtype, torch.float32)
        normed = nn.functional.rms_norm(x.to(wide), self.normalized_shape, self.weight.to(wide), self.eps)
        return normed.to(x.dtype)


def _joined(past: Past | None, k: Tensor, v: Tensor) -> KeyValue:
    """What is read: what came before, and the tokens' own."""
    if past is None:
        return k, v
    if isinstance(past, tuple):
        return torch.cat([past[0], k], 1), torch.cat([past[1], v], 1)
    return past.extend(k, v)


class Attention(nn.Module):
    def __init__(self, config: TrunkConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.width, config.num_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.width, config.num_kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.width, config.num_kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_heads * config.head_dim, config.width, bias=False)
        self.q_norm = RMSNorm(config.head_dim, eps=config.norm_eps)
        self.k_norm = RMSNorm(config.head_dim, eps=config.norm_eps)

    def forward(
        self, x: Float[Tensor, "B L W"], rope: tuple[Tensor, Tensor], attend: Attend, past: Past | None
    ) -> tuple[Float[Tensor, "B L W"], KeyValue]:
        x = narrow(x)
        q, k, v = (
            proj(x).view(*x.shape[:-1], -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(self.q_norm(q), *rope), rotate(self.k_norm(k), *rope)
        keys, values = _joined(past, k, v)
        return self.o_proj(attend(q, keys, values).flatten(-2)), (k, v)


class FeedForward(nn.Module):
    def __init__(self, config: TrunkConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.ffn_width, bias=False)
        self.up_proj = nn.Linear(config.width, config.ffn_width, bias=False)
        self.down_proj = nn.Linear(config.ffn_width, config.width, bias=False)

    def forward(self, x: Float[Tensor, "B L W"]) -> Float[Tensor, "B L W"]:
        x = narrow(x)
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


@dataclass(frozen=True)
class Inputs:
    """What a block needs beside one stream's hidden states. `modulation` is of all blocks, or one's (state only)."""

    rope: tuple[Tensor, Tensor]
    attend: Attend
    modulation: Float[Tensor, "N I 6 W"] | Float[Tensor, "I 6 W"] | None = None
    instance: Int[Tensor, "B S"] | None = None

    def of_block(self, index: int) -> "Inputs":
        """Those of one block, which does not know its own number: what is compiled for one serves all."""
        return self if self.modulation is None else replace(self, modulation=self.modulation[index])


class Block(nn.Module):
    def __init__(self, config: TrunkConfig) -> None:
        super().__init__()
        self.checkpointing: Checkpointing = "none"
        self.input_layernorm = RMSNorm(config.width, eps=config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.width, eps=config.norm_eps)
        self.mlp = FeedForward(config)
        self.state_mlp = FeedForward(config) if config.state_ffn else None

    def expand(self, x: Tensor, inputs: Inputs, past: Past | None) -> tuple[Tensor, KeyValue]:
        attended, kv = self.self_attn(self.input_layernorm(x), inputs.rope, inputs.attend, past)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), kv

    def refine(self, x: Tensor, inputs: Inputs, past: Past) -> Tensor:
        mlp = self.mlp if self.state_mlp is None else self.state_mlp
        if inputs.modulation is None:
            x = x + self.self_attn(self.input_layernorm(x), inputs.rope, inputs.attend, past)[0]
            return x + mlp(self.post_attention_layernorm(x))
        assert inputs.instance is not None, "modulation is per instance"
        # six gathers, not one of six times the width: its gradient would be put together from six copies
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (
            gather(inputs.instance, each) for each in inputs.modulation.unbind(-2)
        )
        normed = torch.addcmul(shift_a, self.input_layernorm(x), scale_a)
        x = torch.addcmul(x, gate_a, self.self_attn(normed, inputs.rope, inputs.attend, past)[0].to(x.dtype))
        normed = torch.addcmul(shift_f, self.post_attention_layernorm(x), scale_f)
        return torch.addcmul(x, gate_f, mlp(normed).to(x.dtype))

    def forward(
        self,
        context: Tensor | None,
        state: Tensor | None,
        context_inputs: Inputs | None,
        state_inputs: Inputs | None,
        past: Past | None,
        target: Tensor | None = None,
        target_inputs: Inputs | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, KeyValue | None]:
        """Expand the context if there is one, then refine the state against its keys and values (or `past`).

        Last, refine the target state against the same ones, without gradient: nothing of the context is computed for
        it, and only one block's keys and values need be alive (or, where weights are sharded, one block's weights).
        """
        both = self._expand_and_refine
        if self.checkpointing != "none" and torch.is_grad_enabled():
            how: dict[str, Any] = {
                "use_reentrant": False,
                "preserve_rng_state": False,
            }  # nothing here is drawn
            if self.checkpointing == "selective":
                how["context_fn"] = partial(create_selective_checkpoint_contexts, _KEPT)
            both = partial(checkpoint, both, **how)
        context, state, kv = both(context, state, context_inputs, state_inputs, past)
        if target is not None:
            reads = kv if kv is not None else past
            assert target_inputs is not None and state is not None and isinstance(reads, tuple)
            # Outside of what is computed again in the backward pass, which has no use for it. After the student:
            # autocast keeps a weight's cast for all who use it, and the student's gradient must not go through one
            # that was made here.
            with torch.no_grad():
                target = self.refine(target, target_inputs, reads)
        return context, state, target, kv

    def _expand_and_refine(
        self,
        context: Tensor | None,
        state: Tensor | None,
        context_inputs: Inputs | None,
        state_inputs: Inputs | None,
        past: Past | None,
    ) -> tuple[Tensor | None, Tensor | None, KeyValue | None]:
        kv = None
        if context is not None:
            assert context_inputs is not None
            context, kv = self.expand(context, context_inputs, past)
        if state is not None:
            reads = kv if kv is not None else past
            assert state_inputs is not None and reads is not None, "a state is refined against a context"
            state = self.refine(state, state_inputs, reads)
        return context, state, kv


class Trunk(nn.Module):
    def __init__(self, config: TrunkConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.width, eps=config.norm_eps)
        self.apply(self._init_weights)
        for name, parameter in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                # depth-scaled output projections (GPT-2): the residual's variance does not grow with the layers
                nn.init.normal_(parameter, std=0.02 / (2 * config.num_layers) ** 0.5)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)

    def inputs(
        self,
        positions: Int[Tensor, "B L 3"],
        attend: Attend,
        modulation: Tensor | None = None,
        instance: Tensor | None = None,
    ) -> Inputs:
        rope = rope_angles(positions, self.config.head_dim, self.config.rope_theta)
        return Inputs(rope, attend, modulation, instance)

    def expand(
        self, x: Float[Tensor, "B L W"], inputs: Inputs, past: Sequence[Past] | None = None
    ) -> tuple[Float[Tensor, "B L W"], list[KeyValue]]:
        """Hidden states of clean tokens before the final norm, and every block's keys and values of them."""
        kvs: list[KeyValue] = []
        for index, block in enumerate(self.layers):
            x, _, _, kv = block(x, None, inputs, None, past[index] if past is not None else None)
            kvs.append(kv)
        return x, kvs

    def refine(
        self, x: Float[Tensor, "B S W"], inputs: Inputs, past: Sequence[Past]
    ) -> Float[Tensor, "B S W"]:
        """Hidden states of noisy tokens before the final norm, read against `past`; nothing is committed."""
        for index, (block, kv) in enumerate(zip(self.layers, past, strict=True)):
            _, x, _, _ = block(None, x, None, inputs.of_block(index), kv)
        return x

    def forward(
        self,
        context: Float[Tensor, "B C W"],
        state: Float[Tensor, "B S W"],
        context_inputs: Inputs,
        state_inputs: Inputs,
        target: Float[Tensor, "B S W"] | None = None,
        target_inputs: Inputs | None = None,
    ) -> tuple[Float[Tensor, "B C W"], Float[Tensor, "B S W"], Float[Tensor, "B S W"] | None]:
        """`expand` then `refine` of each block in turn: equal to the two in sequence, with one block's K/V alive.

        `target` is refined as the state is, with inputs of its own and without gradient.
        """
        for index, block in enumerate(self.layers):
            own, others = state_inputs.of_block(index), target_inputs and target_inputs.of_block(index)
            context, state, target, _ = block(context, state, context_inputs, own, None, target, others)
        return context, state, target

    def checkpoint_blocks(self, checkpointing: Checkpointing) -> None:
        """Says what of a block's activations is kept for the backward pass: all, matrix products' and attention's
        results, or its inputs alone. What is not kept is computed again there; a target pass never is.
        """
        for block in self.layers:
            assert isinstance(block, Block)
            block.checkpointing = checkpointing

    def narrow_weights(self) -> None:
        """Keeps the matrices in bfloat16, for a model that is no longer trained: autocast need not make them so call by
        call, and what it computes stays the same to the bit.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.to(torch.bfloat16)

    def compile_blocks(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Compiles `forward` of a block, whole; all blocks share what comes of it. The first calls take minutes.

        Shapes but the number of instances should stay as they are, or it is compiled again.
        """
        for block in self.layers:
            block.compile(fullgraph=True, backend=backend)
