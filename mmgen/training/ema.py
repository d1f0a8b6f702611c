"""An exponential moving average of the weights, which is what samples are drawn with.

Works on any module; knows nothing of optimizers or steps but their number.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def decay_at(decay: float, updates: int) -> float:
    """Returns the decay of the update after `updates` earlier ones: min(decay, (1 + n) / (10 + n)).

    A constant decay would keep the random weights of the start for a long time. The rule is the `num_updates` one of
    TensorFlow's `tf.train.ExponentialMovingAverage`; it averages over about the last tenth of what was trained.
    """
    return min(decay, (1 + updates) / (10 + updates))


class Ema:
    """The running average of a model's parameters, in float32 at least; its buffers are followed as they are.

    `state_dict()` has the names of the model's own, so it loads into the model; its tensors are the live ones, so that
    a checkpoint is loaded in place. It keeps no counter: the number of updates is the caller's step.
    """

    def __init__(self, model: nn.Module, decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"the decay of the weight average must be at least 0 and below 1, is {decay}")
        self.decay = decay
        averages: dict[int, Tensor] = {}  # by identity: tied weights have one average
        self._state: dict[str, Tensor] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            if id(tensor) not in averages:
                dtype = (
                    torch.promote_types(tensor.dtype, torch.float32) if _averaged(tensor) else tensor.dtype
                )
                averages[id(tensor)] = tensor.detach().to(dtype, copy=True)
            self._state[name] = averages[id(tensor)]

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the averages and the buffers by the model's names; tensors are not copies."""
        return dict(self._state)

    @torch.no_grad()
    def update(self, model: nn.Module, updates: int) -> None:
        """Moves the averages towards the model's weights; `updates` is the number of updates before this one."""
        averages, weights = [], []
        for average, tensor in self._pairs(model):
            if _averaged(tensor):
                averages.append(average)
                weights.append(tensor.detach().to(average.dtype))
            else:
                average.copy_(tensor)
        weight = 1 - decay_at(self.decay, updates)
        torch._foreach_lerp_(averages, weights, weight)  # pyright: ignore[reportPrivateImportUsage]

    @contextmanager
    def swapped(self, model: nn.Module) -> Iterator[None]:
        """Within the context the model has the averaged weights; afterwards its own again, bit for bit."""
        kept = [(tensor, tensor.detach().clone()) for _, tensor in self._pairs(model)]
        try:
            with torch.no_grad():
                for average, tensor in self._pairs(model):
                    tensor.copy_(average)
            yield
        finally:
            with torch.no_grad():
                for tensor, own in kept:
                    tensor.copy_(own)

    def _pairs(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields each (average, tensor of the model) once."""
        seen: set[int] = set()
        for name, tensor in model.state_dict(keep_vars=True).items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield self._state[name], tensor


def _averaged(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
