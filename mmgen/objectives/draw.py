"""The noisy state of a batch: times and noise, keyed by (seed, group), so that no rank or resume changes them."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmgen.modalities import Modality
from mmgen.objectives.base import Objective, Times
from mmgen.rng import keyed_numpy
from mmgen.sequence import PAD, Instances, PackedBatch


@dataclass(frozen=True)
class ShapeGroups:
    """The groups of one shape, G of M particles with N tokens each.

    `slots` are the tokens' places in the flattened state stream; `instance` is one of each group, to look its times up;
    `same_context` says which particles read the same.
    """

    modality: str
    slots: Int[Tensor, "G M N"]
    instance: Int[Tensor, "G"]
    same_context: Bool[Tensor, "G M M"]


@dataclass(frozen=True)
class NoisyState:
    """x_t, noise and times of a batch's state stream. Times are per instance, float64; noise has std sigma_data.

    Where the objective makes a target pass, `x_r` is the same data and noise at r, and `groups` are what its loss
    compares; else both are empty.
    """

    x: dict[str, Float[Tensor, "B S D"]]
    noise: dict[str, Float[Tensor, "B S D"]]
    t: Float[Tensor, "I"]
    s: Float[Tensor, "I"]
    r: Float[Tensor, "I"]
    x_r: dict[str, Float[Tensor, "B S D"]]
    groups: tuple[ShapeGroups, ...]


def draw_state(
    batch: PackedBatch,
    modalities: Mapping[str, Modality],
    objective: Objective,
    seed: int,
    fraction: float = 0.0,
) -> NoisyState:
    """Times and noise for every instance of `batch` (on the CPU), when `fraction` of the training is done."""
    names = list(modalities)
    instance = batch.state.instance
    assert instance is not None
    noise = {name: torch.zeros_like(values) for name, values in batch.state.values.items()}
    slots = _instance_slots(batch)
    times = np.zeros((3, len(slots)))
    draws: dict[int, tuple[np.random.Generator, Times]] = {}
    for index in _by_group(batch.instances):
        kind, group = int(batch.instances.modality[index]), int(batch.instances.group[index])
        if kind == PAD:
            continue
        modality = modalities[names[kind]]
        if group not in draws:
            draw = keyed_numpy(seed, "state", group)
            draws[group] = draw, objective.draw_times(modality.draw_time, draw, fraction)
        draw, own = draws[group]
        times[:, index] = own.t, own.s, own.r
        # the particles of a group draw in their order from one generator
        unit = draw.standard_normal((len(slots[index]), modality.channels), dtype=np.float32)
        flat = noise[names[kind]].view(-1, modality.channels)
        flat[slots[index]] = torch.from_numpy(unit * np.float32(modality.sigma_data))
    t, s, r = torch.from_numpy(times)

    def add_noise(time: Float[Tensor, "I"]) -> dict[str, Float[Tensor, "B S D"]]:
        # float64 per token: the coefficients at t and r differ by less than float32 tells apart in a time
        per_token = time[instance][..., None]
        return {
            name: objective.path.add_noise(values, noise[name], per_token)
            for name, values in batch.state.values.items()
        }

    if not objective.needs_target:
        return NoisyState(add_noise(t), noise, t, s, r, {}, ())
    return NoisyState(
        add_noise(t), noise, t, s, r, add_noise(r), _shape_groups(batch, names, objective.particles, slots)
    )


def check_modalities(objective: Objective, modalities: Mapping[str, Modality]) -> None:
    """Raises ValueError where the objective cannot train a modality."""
    grouping = objective.grouping
    for name, modality in modalities.items():
        if modality.channels and modality.sigma_data != objective.path.sigma_data:
            raise ValueError(
                f"modalities.{name}: values have the standard deviation {modality.sigma_data:g}, the objective's path "
                f"{objective.path.sigma_data:g} (sigma_data); they must be equal"
            )
        if modality.channels and grouping.within and modality.copies % grouping.particles:
            raise ValueError(
                f"modalities.{name}: copies {modality.copies} must be a multiple of objective.particles "
                f"{grouping.particles} where objective.grouping is within"
            )


def _instance_slots(batch: PackedBatch) -> list[Int[Tensor, "N"]]:
    """For each instance its tokens' places in the flattened state stream, in order."""
    assert batch.state.instance is not None
    real = (batch.state.layout.document != PAD).flatten().nonzero()[:, 0]
    order = batch.state.instance.flatten()[real].argsort(stable=True)
    return list(real[order].split(batch.instances.num_tokens.tolist()))


def _by_group(instances: Instances) -> list[int]:
    """Indices of the instances, group after group, in each in the order of its particles."""
    return np.lexsort((instances.particle.numpy(), instances.group.numpy())).tolist()


def _shape_groups(
    batch: PackedBatch, names: list[str], particles: int, slots: list[Int[Tensor, "N"]]
) -> tuple[ShapeGroups, ...]:
    shapes: dict[tuple[int, int], list[int]] = {}
    for index in _by_group(batch.instances):
        kind = int(batch.instances.modality[index])
        if kind != PAD:
            shapes.setdefault((kind, len(slots[index])), []).append(index)
    found = []
    for (kind, _), members in shapes.items():
        grouped = torch.tensor(members).view(-1, particles)
        group = batch.instances.group[grouped]
        assert group.eq(group[:, :1]).all(), "groups are whole and of one shape"
        tokens = torch.stack([slots[index] for index in members])
        context = batch.instances.context[grouped]
        same = context[:, :, None] == context[:, None]
        found.append(ShapeGroups(names[kind], tokens.unflatten(0, grouped.shape), grouped[:, 0], same))
    return tuple(found)
