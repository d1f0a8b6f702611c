"""Each attention backend on a GPU against dense attention in float64: outputs, gradients, and compiled blocks."""

from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from mmgen.model.attention import AttentionBackend, choose_backend, plan_attention
from mmgen.model.model import plan_batch
from mmgen.model.trunk import Checkpointing, TrunkConfig
from mmgen.objectives import IMM, IMMConfig
from mmgen.sequence import PAD, Layout, move
from mmgen.training.losses import compute_losses, weighted
from mmgen.training.run import Parts
from tests.model.packs import padded, random_pack, streams
from tests.model.test_compile import feed
from tests.parts import modalities, model, tokenizer

pytestmark = pytest.mark.gpu

HEADS, KV_HEADS = 4, 2
HEAD_DIMS = (32, 128)  # of the demo's order, and of configs/t2i-*.yaml
DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}
# of the largest value: bfloat16 has 8 bits; Triton may multiply float32 in TF32, which has 11
TOLERANCES = {"bf16": 2e-2, "float32": 5e-3}


def need(backend: AttentionBackend, precision: str, head_dim: int) -> None:
    """Skips with the reason why a backend cannot run here."""
    try:
        choose_backend(backend, torch.device("cuda"), head_dim, precision)
    except ValueError as error:
        pytest.skip(str(error))


def outcome(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    given: list[Tensor],
    queries: Layout,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Output for real queries and the gradients of a function of it, in float64."""
    q, k, v = (x.to(dtype).requires_grad_() for x in given)
    out = attend(q, k, v) * (queries.document != PAD).cuda()[..., None, None]
    weights = torch.linspace(-1, 1, out.numel(), device="cuda").view_as(out).to(dtype)
    return [x.double() for x in (out, *torch.autograd.grad((out * weights).sum(), (q, k, v)))]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("precision", ["bf16", "float32"])
@pytest.mark.parametrize("backend", get_args(AttentionBackend))
def test_outputs_and_gradients_are_denses(backend: AttentionBackend, precision: str, head_dim: int):
    need(backend, precision, head_dim)
    for seed in range(8):
        pack = random_pack(np.random.default_rng(seed), longest=90)
        for queries, keys in streams(*(padded(layout, 512) for layout in pack)):
            if not (queries.document != PAD).any():
                continue
            draw = torch.Generator("cuda").manual_seed(seed)
            # numbers that every precision holds exactly, so that only the computation differs
            given = [
                torch.randn(*shape, head_dim, device="cuda", generator=draw).to(torch.bfloat16)
                for shape in ((*queries.shape, HEADS), (*keys.shape, KV_HEADS), (*keys.shape, KV_HEADS))
            ]
            dense = plan_attention(move(queries, "cuda"), move(keys, "cuda"), "dense")
            expected = outcome(dense, given, queries, torch.float64)
            plan = move(plan_attention(queries, keys, backend), "cuda")
            for found, known in zip(outcome(plan, given, queries, DTYPES[precision]), expected, strict=True):
                assert (found - known).abs().max() < TOLERANCES[precision] * known.abs().max()


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_flex_in_compiled_blocks_has_denses_gradients_and_compiles_nothing_anew(checkpointing: Checkpointing):
    head_dim = HEAD_DIMS[0]
    need("flex", "float32", head_dim)
    torch.compiler.reset()
    trunk = TrunkConfig(
        width=64, num_layers=2, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=head_dim, ffn_width=96
    )
    network = model(trunk, dtype=torch.float32).cuda()
    parts = Parts(tokenizer(), modalities(), network, IMM(IMMConfig(k=4.0)))
    counted = torch._dynamo.utils.counters["stats"]

    def gradients(backend: AttentionBackend, num_documents: int) -> list[Tensor]:
        each = feed(parts.objective, num_documents)
        each = replace(each, attention=plan_batch(each.batch, backend))
        weighted(parts, compute_losses(parts, each, "float32", torch.device("cuda"))).backward()
        found = [p.grad.clone() for p in network.parameters() if p.grad is not None]
        network.zero_grad(set_to_none=True)
        return found

    sizes = (8, 4, 12, 16)
    dense = [gradients("dense", size) for size in sizes]
    network.trunk.checkpoint_blocks(checkpointing)
    network.trunk.compile_blocks()
    counts = []
    for size, expected in zip(sizes, dense, strict=True):
        for one, other in zip(gradients("flex", size), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0.05, atol=1e-3)
        counts.append(counted["unique_graphs"])
    assert counts[1] == counts[2] == counts[3], "batches compile nothing after the second"
    torch.compiler.reset()
