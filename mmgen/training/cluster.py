"""What training costs beside its products: bytes that sharded weights send, and seconds of both, from datasheets.

The layout is FSDP2's: weights, gradients, optimizer state and averages are cut over a group of `shards` GPUs, and
groups are replicas of each other (HSDP). Blocks gather their weights as bfloat16 for the forward and again for the
backward pass of every packed batch, the rest once as float32; gradients are summed as float32.
"""

from dataclasses import dataclass

from mmgen.devices import Device

GATHERED, SUMMED = 2, 4  # bytes of a block's weight on its way, and of anything else


@dataclass(frozen=True)
class Cluster:
    """The machines, and what is assumed of them. Bandwidths are bytes a second in one direction."""

    device: Device
    gpus: int = 1
    shards: int | None = None
    """GPUs that hold one copy of everything together; None is all of them"""
    node: int = 8
    """GPUs that are joined by the device's link"""
    network: float = 50e9
    """of each GPU's own adapter to other nodes (50e9: 400 Gbit/s)"""
    utilization: float = 0.45
    """share of the dense peak at which products run, recomputed and masked ones included: assumed, not measured"""

    def __post_init__(self) -> None:
        for name in ("gpus", "node"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if self.shards is not None and (self.shards < 1 or self.gpus % self.shards):
            raise ValueError(f"shards {self.shards} must divide gpus {self.gpus}: groups are of one size")
        if not 0 < self.utilization <= 1:
            raise ValueError(f"mfu {self.utilization} must be above 0 and at most 1")
        if not self.network > 0:
            raise ValueError(f"network {self.network} must be above 0")

    @property
    def group(self) -> int:
        """GPUs of a shard group."""
        return self.gpus if self.shards is None else self.shards

    @property
    def replicas(self) -> int:
        return self.gpus // self.group


@dataclass(frozen=True)
class Communication:
    """Bytes that one GPU sends (and receives) in an optimizer step."""

    all_gather: float
    reduce_scatter: float
    all_reduce: float
    """of gradients, between replicas"""
    muon_gather: float
    """of the gradients of whole matrices, and of their updates back"""
    seconds: float
    """at the link's or the network's bandwidth, whichever is slower for what crosses it"""

    @property
    def total(self) -> float:
        return self.all_gather + self.reduce_scatter + self.all_reduce + self.muon_gather


def communication(
    cluster: Cluster, block_parameters: int, other_parameters: int, batches: float, muon_parameters: int = 0
) -> Communication:
    """Of an optimizer step of `batches` packed batches a GPU.

    Gradients are scattered after every packed batch and summed over replicas once a step. Muon's matrices are put
    together as float32 on one GPU of the group each, and their updates sent back as bfloat16.
    """
    group, replicas = cluster.group, cluster.replicas
    sent = (group - 1) / group
    gathered = sent * batches * (2 * GATHERED * block_parameters + SUMMED * other_parameters)
    gradients = SUMMED * (block_parameters + other_parameters)
    scattered = sent * batches * gradients
    reduced = 2 * (replicas - 1) / replicas * gradients / group
    muon = sent * (SUMMED + GATHERED) * muon_parameters / group
    within = _seconds(cluster, gathered + scattered + muon, group)
    return Communication(
        gathered, scattered, reduced, muon, within + _replica_seconds(cluster, reduced, gradients)
    )


def _seconds(cluster: Cluster, sent: float, group: int) -> float:
    """Of a ring over a shard group: all nodes' adapters work at once, and each node needs what the others hold."""
    nodes = -(-group // cluster.node)
    if group == 1:
        return 0.0
    total = sent * group / (group - 1)
    across = total * (1 - 1 / nodes) / (min(cluster.node, group) * cluster.network)
    return max(sent / cluster.device.link_bandwidth, across)


def _replica_seconds(cluster: Cluster, sent: float, gradients: float) -> float:
    """Of the sum over replicas, of which a node holds as many different shards as there is room for."""
    if cluster.replicas == 1:
        return 0.0
    nodes = -(-cluster.gpus // cluster.node)
    held = gradients * min(cluster.group, cluster.node) / cluster.group
    across = 2 * (1 - 1 / nodes) * held / (min(cluster.node, cluster.gpus) * cluster.network)
    return max(sent / cluster.device.link_bandwidth, across)
