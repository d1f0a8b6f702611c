"""Joint heads over the next k tokens, and the one that a config names."""

from mmgen.model.joint.base import (
    Draft,
    Drawn,
    JointConfig,
    JointHead,
    JointKind,
    Law,
    invert,
    label_windows,
    plain,
)
from mmgen.model.joint.chain import ChainHead
from mmgen.model.joint.mixture import MixtureHead
from mmgen.model.trunk import TrunkConfig


def build_joint_head(config: JointConfig, trunk: TrunkConfig) -> JointHead:
    """The head that a config names, for hidden states of a trunk."""
    if config.kind == "chain":
        return ChainHead(config, trunk)
    return MixtureHead(config, trunk)


def draft_flops(config: JointConfig, trunk: TrunkConfig, num_drafted: int, vocab_size: int) -> float:
    """Operations (two a multiply-add, matrix products alone) of drafting x_2.. for one row, x_1 being given."""
    if config.kind == "chain":
        return ChainHead.draft_flops(trunk, num_drafted, vocab_size)
    return MixtureHead.draft_flops(config, trunk, num_drafted, vocab_size)


__all__ = [
    "ChainHead",
    "Draft",
    "Drawn",
    "JointConfig",
    "JointHead",
    "JointKind",
    "Law",
    "MixtureHead",
    "build_joint_head",
    "draft_flops",
    "invert",
    "label_windows",
    "plain",
]
