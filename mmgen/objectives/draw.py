"""The noisy state of a batch: times and noise, keyed by (seed, group), so that no rank or resume changes them."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mmgen.modalities import Modality
from mmgen.objectives.base import Objective
from mmgen.rng import keyed_numpy
from mmgen.sequence import PAD, PackedBatch


@dataclass(frozen=True)
class NoisyState:
    """x_t, noise and times of a batch's state stream. Times are per instance, float64; noise has std sigma_data."""

    x: dict[str, Float[Tensor, "B S D"]]
    noise: dict[str, Float[Tensor, "B S D"]]
    t: Float[Tensor, "I"]
    s: Float[Tensor, "I"]


def draw_state(
    batch: PackedBatch, modalities: Mapping[str, Modality], objective: Objective, seed: int
) -> NoisyState:
    """Times and noise for every instance of `batch` (on the CPU)."""
    names = list(modalities)
    instance = batch.state.instance
    assert instance is not None
    noise = {name: torch.zeros_like(values) for name, values in batch.state.values.items()}
    t, s = np.zeros((2, len(batch.instances.group)))
    # token slots of instance i, in order: a stable sort of the real tokens by instance
    real = (batch.state.layout.document != PAD).flatten()
    slots = real.nonzero()[:, 0]
    slots = slots[instance.flatten()[slots].argsort(stable=True)]
    start = 0
    draws: dict[int, tuple[np.random.Generator, float, float]] = {}
    for index, (group, kind, count) in enumerate(
        zip(
            batch.instances.group.tolist(),
            batch.instances.modality.tolist(),
            batch.instances.num_tokens.tolist(),
            strict=True,
        )
    ):
        if kind == PAD:
            continue
        modality = modalities[names[kind]]
        if group not in draws:
            draw = keyed_numpy(seed, "state", group)
            times = objective.draw_times(modality.draw_time, draw)
            draws[group] = (draw, times.t, times.s)
        draw, t[index], s[index] = draws[group]
        unit = draw.standard_normal((count, modality.channels), dtype=np.float32)
        flat = noise[names[kind]].view(-1, modality.channels)
        flat[slots[start : start + count]] = torch.from_numpy(unit * np.float32(modality.sigma_data))
        start += count
    times_t, times_s = torch.from_numpy(t), torch.from_numpy(s)
    per_token = times_t[instance][..., None].float()
    x = {
        name: objective.path.add_noise(values, noise[name], per_token)
        for name, values in batch.state.values.items()
    }
    return NoisyState(x, noise, times_t, times_s)
