"""Joint heads over the next k tokens, and the one that a config names."""

from mmgen.model.joint.base import (
    Draft,
    Drawn,
    JointConfig,
    JointHead,
    JointKind,
    Law,
    Vocabulary,
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


__all__ = [
    "ChainHead",
    "Draft",
    "Drawn",
    "JointConfig",
    "JointHead",
    "JointKind",
    "Law",
    "MixtureHead",
    "Vocabulary",
    "build_joint_head",
    "invert",
    "label_windows",
    "plain",
]
