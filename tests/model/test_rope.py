"""Rotary positions: one axis on text, and relative on every axis."""

import torch
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding, apply_rotary_pos_emb

from mmgen.model.rope import rope_angles, rotate


def test_on_text_it_is_the_rotation_of_qwen3():
    config = Qwen3Config(head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 5_000.0})
    positions = torch.arange(11)[None]
    q, k = torch.randn(2, 1, 3, 11, 16)
    cos, sin = Qwen3RotaryEmbedding(config)(q, positions)
    expected = apply_rotary_pos_emb(q, k, cos, sin)
    angles = rope_angles(positions[..., None].expand(-1, -1, 3), 16, 5_000.0)
    for ours, theirs in zip((q, k), expected, strict=True):
        torch.testing.assert_close(
            rotate(ours.transpose(1, 2), *angles).transpose(1, 2), theirs, rtol=1e-6, atol=1e-6
        )


def test_scores_depend_on_differences_of_positions_on_each_axis():
    q, k = torch.randn(2, 1, 1, 1, 24, dtype=torch.float64)

    def score(a: list[int], b: list[int]) -> float:
        turned = [rotate(x, *rope_angles(torch.tensor([[p]]), 24, 100.0)) for x, p in ((q, a), (k, b))]
        return float((turned[0] * turned[1]).sum())

    base = score([5, 7, 9], [4, 2, 1])
    assert abs(base - score([15, 8, 39], [14, 3, 31])) < 1e-5
    for axis in range(3):
        moved = [5, 7, 9]
        moved[axis] += 1
        assert abs(base - score(moved, [4, 2, 1])) > 1e-4, f"axis {axis} is not used"
