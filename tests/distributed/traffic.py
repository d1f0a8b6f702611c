"""`mmgen train CONFIG` under torchrun, which also writes what a rank's collectives sent in the last step: bytes by
kind, as a ring sends them, in CONFIG.RANK.json."""

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

from mmgen.cli.main import main
from mmgen.training.step import Stepper

OPS = torch.ops.c10d


class Traffic(TorchDispatchMode):
    """Counts within its context; the sums of a few numbers that DTensor makes are not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = Counter(all_gather=0, reduce_scatter=0, all_reduce=0, all_to_all=0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is OPS._allgather_base_.default:
            whole, _, group = args[:3]
            self._ring("all_gather", 1, whole, group)
        elif func is OPS._reduce_scatter_base_.default:
            _, whole, group = args[:3]
            self._ring("reduce_scatter", 1, whole, group)
        elif func is OPS.allreduce_.default:
            (whole,), group = args[:2]
            self._ring("all_reduce", 2, whole, group)
        elif func is OPS.alltoall_base_.default:
            _, own, group, _, given = args[:5]
            kept = given[ProcessGroup.unbox(group).rank()]
            self.sent["all_to_all"] += (len(own) - kept) * own.itemsize
        return func(*args, **kwargs or {})

    def _ring(self, kind: str, times: int, whole: torch.Tensor, group: Any) -> None:
        size = ProcessGroup.unbox(group).size()
        self.sent[kind] += times * (size - 1) * whole.nbytes // size


if __name__ == "__main__":
    path, take = Path(sys.argv[1]), Stepper.take

    def watched(*args: Any) -> Any:
        with Traffic() as traffic:
            taken = take(*args)
        path.with_suffix(f".{os.environ['RANK']}.json").write_text(json.dumps(traffic.sent))
        return taken

    Stepper.take = watched
    sys.exit(main(["train", str(path)]))
