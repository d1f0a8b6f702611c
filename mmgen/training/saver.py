"""When and where a run's checkpoints are written: in the step that asks for one, or in a thread beside the next steps.

A thread gets copies in the host's memory, so training may go on at once. There is one at a time: the next save waits
for it, and what went wrong in it is raised there.
"""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from mmgen.training.checkpoint import Tensors, prune, save_checkpoint
from mmgen.training.ranks import distributed
from mmgen.training.run import CheckpointConfig


class Saver:
    """Writes the checkpoints of one run under `folder` and removes those that are not to be kept.

    Made, and used, by all ranks alike.
    """

    def __init__(self, folder: Path, config: CheckpointConfig) -> None:
        self.folder, self.config = folder, config
        self._group: Any = None  # of the thread's own: its exchanges must not meet those of the steps
        self._meshes: dict[DeviceMesh, DeviceMesh] = {}
        self._thread: ThreadPoolExecutor | None = None
        self._pending: Future[Path] | None = None
        if config.background:
            self._thread = ThreadPoolExecutor(1, "checkpoint")
            self._group = dist.new_group(backend="gloo") if distributed() else None

    def save(self, step: int, tensors: Mapping[str, Tensors], scalars: Mapping[str, Any]) -> None:
        """Writes a checkpoint, or begins to. Raises OSError where this one or the one before it cannot be written."""
        self.wait()
        if self._thread is None:
            self._write(step, tensors, scalars)
        else:
            copies = {section: self._copied(state) for section, state in tensors.items()}
            self._pending = self._thread.submit(self._write, step, copies, scalars)

    def wait(self) -> None:
        """Returns once what was begun is on disk. Raises OSError where it cannot be written."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Ends the thread, after what it has begun."""
        if self._thread is not None:
            self._thread.shutdown()

    def _write(self, step: int, tensors: Mapping[str, Tensors], scalars: Mapping[str, Any]) -> Path:
        path = save_checkpoint(self.folder, step, tensors, scalars, self._group)
        prune(self.folder, self.config.keep_last, self.config.milestones)
        return path

    def _copied(self, state: Tensors) -> dict[str, Any]:
        return {
            key: self._copy(value) if isinstance(value, Tensor) else self._copied(value)
            for key, value in state.items()
        }

    def _copy(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if not isinstance(tensor, DTensor):
            return tensor.to("cpu", copy=True)
        mesh = tensor.device_mesh
        if mesh not in self._meshes:
            self._meshes[mesh] = DeviceMesh("cpu", mesh.mesh, mesh_dim_names=mesh.mesh_dim_names)
        local = tensor.to_local().to("cpu", copy=True)
        return DTensor.from_local(
            local,
            self._meshes[mesh],
            tensor.placements,
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )
