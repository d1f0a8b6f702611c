"""How a model is shared by ranks: FSDP2 on each block, and HSDP where copies of the model stand side by side."""

import warnings

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from mmgen.model.model import Model
from mmgen.training.ranks import Ranks


def build_mesh(ranks: Ranks, replicas: int) -> DeviceMesh:
    """All ranks share one copy of the weights, or the ranks of each of `replicas` groups do.

    Raises ValueError where the groups are not of one size.
    """
    if ranks.num_ranks % replicas:
        raise ValueError(f"train.replicas {replicas} does not divide the {ranks.num_ranks} ranks")
    device = ranks.device.type
    if replicas == 1:
        return init_device_mesh(device, (ranks.num_ranks,), mesh_dim_names=("shard",))
    shape = (replicas, ranks.num_ranks // replicas)
    return init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard"))


def shard(model: Model, mesh: DeviceMesh, precision: str) -> None:
    """Leaves each rank its rows of every parameter; what a block needs of the others is there while it runs.

    With bf16 the weights of the blocks travel in bfloat16, and gradients are summed in float32. Embeddings, heads and
    the time conditioning are computed in float32, so they travel so.

    A block is the smallest unit: within one, which of its passes takes part in the gradient depends on what the rank's
    batch holds, and ranks must exchange the same things in the same order.
    """
    # Blocks return keys and values, the model what linear maps leave: views, which nothing here changes in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    wide = MixedPrecisionPolicy(cast_forward_inputs=False)  # the residual lane is the model's business
    narrow = wide
    if precision == "bf16":
        narrow = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in model.trunk.layers:
        fully_shard(block, mesh=mesh, mp_policy=narrow)
    fully_shard(model, mesh=mesh, mp_policy=wide)
    for verb in ("expand", "refine"):  # drawing pictures calls them in place of forward
        register_fsdp_forward_method(model, verb)


def forget_gathered(model: nn.Module) -> None:
    """Drops what was gathered of other ranks' weights and not used up by a backward pass, before weights change."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
