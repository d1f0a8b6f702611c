"""The rule as segments: dense attention in float64, gradients included; and each kernel called as its package wants."""

import inspect
import pickle
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmgen.model.attention import flash, memory_efficient, plan_attention, varlen
from mmgen.model.attention.rule import allow, count_pairs
from mmgen.model.attention.segments import SegmentAttention, Segments, find_segments
from mmgen.sequence import PAD, Layout, move
from tests.model.packs import layout_of, per_segment, random_pack, streams


def outcome(attend: Any, queries: Layout, keys: Layout, seed: int = 0) -> list[Tensor]:
    """Output for real queries, and the gradients of a function of it."""
    draw = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(*shape, 8, dtype=torch.float64, generator=draw).requires_grad_()
        for shape in ((*queries.shape, 4), (*keys.shape, 2), (*keys.shape, 2))
    )
    out = attend(q, k, v) * (queries.document != PAD)[..., None, None]
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
    return [out, *torch.autograd.grad((out * weights).sum(), (q, k, v))]


@pytest.mark.parametrize("seed", range(40))
def test_segments_equal_dense_with_gradients(seed: int):
    context, state = random_pack(np.random.default_rng(seed))
    for queries, keys in (*streams(context, state), (state, state)):
        if not (queries.document != PAD).any():
            continue  # a pack without noisy copies has nothing to differentiate
        dense = outcome(plan_attention(queries, keys, "dense"), queries, keys)
        found = outcome(SegmentAttention.plan(queries, keys, per_segment), queries, keys)
        for one, other in zip(found, dense, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_segments_over_a_cache_equal_dense():
    """New tokens over a padded cache, as sampling reads."""
    cached = layout_of([[(0, b, b, True) for b in range(4)], [(1, b, b, True) for b in range(7)]])
    new = layout_of(
        [[(0, 9, 4, True), (0, 10, 5, True)], [(1, 11, 7, True), (1, 12, 8, False), (1, 12, 8, False)]]
    )
    keys = Layout.concat([cached, new])
    dense = outcome(plan_attention(new, keys, "dense"), new, keys)
    found = outcome(SegmentAttention.plan(new, keys, per_segment), new, keys)
    for one, other in zip(found, dense, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_a_causal_call_that_is_aligned_at_the_top_would_be_noticed():
    """The control: what flash-attn before 2.1 called causal."""

    def top_left(q: Tensor, k: Tensor, v: Tensor, segments: Segments, _: object) -> Tensor:
        if not segments.causal:
            return per_segment(q, k, v, segments)
        lengths = torch.minimum(segments.query_starts.diff(), segments.key_starts.diff())
        keep = torch.cat(
            [start + torch.arange(n) for start, n in zip(segments.key_starts, lengths, strict=False)]
        )
        bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        return per_segment(q, k[keep], v[keep], replace(segments, key_starts=bounds))

    context, _ = random_pack(np.random.default_rng(1))
    dense = plan_attention(context, context, "dense")
    found = SegmentAttention.plan(context, context, top_left)
    assert (outcome(found, context, context)[0] - outcome(dense, context, context)[0]).abs().max() > 0.1


def test_pairs_are_those_that_the_rule_allows_each_once():
    for seed in range(60):
        for queries, keys in streams(*random_pack(np.random.default_rng(seed))):
            pairs = torch.zeros(queries.document.numel(), keys.document.numel(), dtype=torch.long)
            for segments in find_segments(queries, keys):
                for i in range(len(segments.query_starts) - 1):
                    ours = segments.queries[segments.query_starts[i] : segments.query_starts[i + 1]]
                    theirs = segments.keys[segments.key_starts[i] : segments.key_starts[i + 1]]
                    read = torch.ones(len(ours), len(theirs), dtype=torch.long)
                    pairs[ours[:, None], theirs] += (
                        read.tril(len(theirs) - len(ours)) if segments.causal else read
                    )
            allowed = allow(queries, keys) & (queries.document != PAD)[..., None]
            assert torch.equal(pairs, torch.block_diag(*allowed.long()))
            assert pairs.sum() == count_pairs(queries, keys)


def test_nothing_but_padding_has_no_segments():
    empty = layout_of([[]])
    assert plan_attention(empty, empty, "varlen")(*torch.randn(3, *empty.shape, 2, 4)).abs().sum() == 0


def example() -> tuple[Layout, Layout]:
    """State over both streams, with segments of one kind, and context over context with both."""
    return random_pack(np.random.default_rng(4))


def check_kernel(backend: Any) -> None:
    """That a backend, its kernel played by `per_segment`, equals dense."""
    for queries, keys in streams(*example()):
        plan = move(pickle.loads(pickle.dumps(plan_attention(queries, keys, backend))), "cpu")
        dense = outcome(plan_attention(queries, keys, "dense"), queries, keys)
        for one, other in zip(outcome(plan, queries, keys), dense, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def segments_of(starts_q: Tensor, starts_k: Tensor, longest_q: int, longest_k: int, causal: bool) -> Segments:
    """From what a kernel was given, which must hold together."""
    assert starts_q.dtype == starts_k.dtype == torch.int32
    assert longest_q == starts_q.diff().max() and longest_k == starts_k.diff().max()
    nothing = torch.empty(0, dtype=torch.long)
    return Segments(nothing, nothing, starts_q, starts_k, longest_q, longest_k, causal)


def test_varlen_calls_torch_by_its_signature(monkeypatch: pytest.MonkeyPatch):
    from torch.nn.attention import varlen as torchs

    signature = inspect.signature(torchs.varlen_attn)

    def play(*given: Any, **named: Any) -> Tensor:
        a = signature.bind(*given, **named).arguments
        assert a["enable_gqa"] and a["window_size"] in ((-1, 0), (-1, -1))
        bounds = a["cu_seq_q"], a["cu_seq_k"], a["max_q"], a["max_k"]
        segments = segments_of(*bounds, causal=a["window_size"] == (-1, 0))
        return per_segment(a["query"], a["key"], a["value"], segments)

    monkeypatch.setattr(torchs, "varlen_attn", play)
    check_kernel("varlen")


@pytest.mark.parametrize(
    ("backend", "package", "with_lse"),
    [
        ("flash2", "flash_attn", False),
        ("flash3", "flash_attn_interface", False),
        ("flash3", "flash_attn_interface", True),
    ],
)
def test_flash_calls_by_the_names_of_its_arguments(
    backend: str, package: str, with_lse: bool, monkeypatch: pytest.MonkeyPatch
):
    def play(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal):
        segments = segments_of(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)
        out = per_segment(q, k, v, segments)
        return (out, None) if with_lse else out

    module = ModuleType(package)
    module.flash_attn_varlen_func = play  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, package, module)
    check_kernel(backend)


def test_masks_of_xformers_are_the_segments(monkeypatch: pytest.MonkeyPatch):
    """Its kernels need a GPU, its masks do not: they are written out, and dense attention does the rest."""
    monkeypatch.syspath_prepend(Path(sys.prefix) / "xformers")  # where `make install` puts it
    ops = pytest.importorskip("xformers.ops", reason="needs the package xformers")

    def play(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any) -> Tensor:
        assert q.shape[2] == k.shape[2], "its kernels want as many heads of keys as of queries"
        bias = attn_bias.materialize((q.shape[1], k.shape[1]), dtype=q.dtype)
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=bias).transpose(1, 2)

    monkeypatch.setattr(ops, "memory_efficient_attention", play)
    check_kernel("xformers")


def test_kernels_are_sent_between_processes_by_name():
    for kernel in (varlen.attend, flash.attend_2, flash.attend_3, memory_efficient.attend):
        assert pickle.loads(pickle.dumps(kernel)) is kernel
