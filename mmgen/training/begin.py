"""Where a run's weights begin: drawn anew, or those of another run, which may know fewer modalities."""

from pathlib import Path

from torch import nn

from mmgen.model.model import Model
from mmgen.training.checkpoint import load_checkpoint, stored_names
from mmgen.training.run import find_checkpoint


def begin_from(model: Model, source: str | Path) -> str:
    """Copies the averaged weights of a run, or of one of its checkpoints, into `model`; returns a line that says what.

    Parts that the source lacks (a modality's embedding and head, the joint head) keep their fresh weights: so a text
    model learns pictures. All else must fit: ValueError says what does not.
    """
    checkpoint = find_checkpoint(source)
    stored = stored_names(checkpoint, "ema")
    fresh = [name for name in _parts(model) if not any(key.startswith(f"{name}.") for key in stored)]
    wanted = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not any(name.startswith(f"{part}.") for part in fresh)
    }
    load_checkpoint(checkpoint, {"ema": wanted})
    new = f"; new: {', '.join(fresh)}" if fresh else ""
    return f"beginning with the averaged weights of {checkpoint}{new}"


def _parts(model: Model) -> list[str]:
    """Names of the parts that a model may have or not."""
    parts = [f"{kind}.{name}" for kind in ("embeddings", "heads") for name in getattr(model, kind)]
    return parts + (["joint_head"] if isinstance(model.joint_head, nn.Module) else [])
