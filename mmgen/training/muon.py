"""Muon over matrices that ranks hold in shards: each is whole on one rank while it is orthogonalized.

Newton-Schulz iterations need the whole matrix. On sharded tensors torch's own Muon would exchange rows in every product
of every iteration, and do the work once for each rank; here a matrix travels once there and once back, and the ranks
share the work.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.optim._muon import (  # what torch.optim.Muon itself calls; torch has no public name for it
    _adjust_lr,
    _zeropower_via_newtonschulz,
)


class ShardedMuon(torch.optim.Muon):
    """torch.optim.Muon with the same state and settings, for DTensors whose rows the ranks share."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        assert closure is None, "a step evaluates nothing"
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            at_once = _shard_group(params[0]).size() if params else 1
            for first in range(0, len(params), at_once):
                self._step(params[first : first + at_once], group)

    def _step(self, params: Sequence[DTensor], group: dict) -> None:
        """As many matrices as there are ranks at most: each rank orthogonalizes one."""
        updates = []
        for param in params:
            state = self.state[param]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(param)
            assert isinstance(param.grad, DTensor)
            buffer, grad = state["momentum_buffer"].to_local(), param.grad.to_local()
            buffer.lerp_(grad, 1 - group["momentum"])
            updates.append(grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer)
        ranks = _shard_group(params[0])
        whole = _to_owners(updates, params, ranks)
        if whole is not None:
            whole = _zeropower_via_newtonschulz(
                whole, group["ns_coefficients"], group["ns_steps"], group["eps"]
            ).contiguous()
        for param, update in zip(params, _from_owners(whole, params, ranks), strict=True):
            lr = group["lr"]
            own = param.to_local()
            own.mul_(1 - lr * group["weight_decay"])
            own.add_(update, alpha=-_adjust_lr(lr, group["adjust_lr_fn"], param.shape))


def _shard_group(param: DTensor) -> dist.ProcessGroup:
    """The ranks that share the matrix: those of the last axis of the mesh (the one before it copies)."""
    assert isinstance(param.placements[-1], Shard) and param.placements[-1].dim == 0, (
        "rows are what is shared"
    )
    return param.device_mesh.get_group(param.device_mesh.ndim - 1)


def _rows(param: DTensor, ranks: dist.ProcessGroup) -> list[int]:
    """Rows on each rank: as torch.chunk deals them."""
    size = -(-param.shape[0] // ranks.size())
    return [min(size, max(0, param.shape[0] - rank * size)) for rank in range(ranks.size())]


def _to_owners(
    updates: Sequence[Tensor], params: Sequence[DTensor], ranks: dist.ProcessGroup
) -> Tensor | None:
    """The whole matrix whose number in `params` is this rank's, None where there is none."""
    rank = ranks.rank()
    send = [update.flatten() for update in updates]
    counts = [len(part) for part in send] + [0] * (ranks.size() - len(send))
    if rank < len(params):
        param = params[rank]
        taken = [rows * param.shape[1] for rows in _rows(param, ranks)]
    else:
        taken = [0] * ranks.size()
    out = send[0].new_empty(sum(taken))
    dist.all_to_all_single(out, torch.cat(send), taken, counts, group=ranks)
    return out.view(params[rank].shape) if rank < len(params) else None


def _from_owners(whole: Tensor | None, params: Sequence[DTensor], ranks: dist.ProcessGroup) -> list[Tensor]:
    """This rank's rows of what became of each matrix, in bfloat16 as the iterations leave it."""
    own = [param.to_local() for param in params]
    counts = [part.numel() for part in own] + [0] * (ranks.size() - len(own))
    if whole is None:
        given, send = [0] * ranks.size(), own[0].new_empty(0, dtype=torch.bfloat16)
    else:
        given = [rows * whole.shape[1] for rows in _rows(params[ranks.rank()], ranks)]
        send = whole.flatten()
    out = send.new_empty(sum(counts))
    dist.all_to_all_single(out, send, counts, given, group=ranks)
    parts = out.split(counts[: len(own)])
    return [part.view(like.shape) for part, like in zip(parts, own, strict=True)]
