"""The processes of one run: what they are, how numbers of all of them come together, and how a lost one is reported.

Without torchrun there is one rank, and every function here works without a process group.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = timedelta(minutes=15)  # a rank that is silent for so long is taken for dead
# What a collective says where another process is gone or silent (gloo, then NCCL and its store).
_LOST = (
    "connection closed",
    "connection reset",
    "timed out",
    "timeout",
    "broken pipe",
    "remote process exited",
)


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run."""

    rank: int
    num_ranks: int
    device: torch.device


@contextmanager
def joined() -> Iterator[Ranks]:
    """Within the context the processes that torchrun started are one group: NCCL on GPUs, gloo on CPUs.

    Raises OSError with one line where another rank is lost: there is no one to wait for, and nothing to save that the
    last checkpoint lacks but the steps after it.
    """
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if num_ranks == 1:
        yield Ranks(0, 1, default_device())
        return
    device = default_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=TIMEOUT, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    try:
        yield Ranks(dist.get_rank(), num_ranks, device)
        dist.barrier()  # who leaves while another is still connected may abort it (gloo)
    except RuntimeError as error:
        if any(sign in str(error).lower() for sign in _LOST):
            raise OSError(
                f"rank {dist.get_rank()} of {num_ranks}: another rank is gone or does not answer; its own log says "
                "why. Start all of them again with --resume to go on from the last checkpoint"
            ) from error
        raise
    dist.destroy_process_group()


def default_device() -> torch.device:
    """This process's GPU (torchrun's LOCAL_RANK; without it the first), or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def current_rank() -> int:
    return dist.get_rank() if distributed() else 0


def barrier(group: dist.ProcessGroup | None = None) -> None:
    """Returns once every rank (of `group`, or of all) has come here."""
    if distributed():
        dist.barrier(group)


def gathered(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """The `value` of every rank, in their order; exchanged in `group`, which holds all of them."""
    if not distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group)
    return values


def summed(*counts: Mapping[str, int]) -> list[Counter[str]]:
    """Each of some counts of all ranks together, in one exchange; every rank has the same names, those of zero too."""
    if not distributed():
        return [Counter(each) for each in counts]
    names = [sorted(each) for each in counts]
    own = [each[name] for each, of_each in zip(counts, names, strict=True) for name in of_each]
    values = torch.tensor(own, device=_collective_device())
    dist.all_reduce(values)
    everyones = iter(values.tolist())
    return [Counter({name: next(everyones) for name in of_each}) for of_each in names]


def total(value: Tensor) -> float:
    """The sum over ranks of a number."""
    if distributed():
        value = value.detach().to(_collective_device(), torch.float64, copy=True)  # it is reduced in place
        dist.all_reduce(value)
    return float(value)


def in_all(flags: Tensor) -> Tensor:
    """Per flag (bool) whether it is set on every rank."""
    if not distributed():
        return flags
    reduced = flags.to(_collective_device(), torch.int32)
    dist.all_reduce(reduced, op=dist.ReduceOp.MIN)
    return reduced.bool()


def in_any(flag: bool) -> bool:
    """Whether it is set on some rank."""
    return not bool(in_all(torch.tensor([not flag])).item())


def _collective_device() -> torch.device:
    return default_device() if dist.get_backend() == "nccl" else torch.device("cpu")
