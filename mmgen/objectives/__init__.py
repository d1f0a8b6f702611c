"""Training objectives for continuous modalities, over one path and one jump."""

from mmgen.objectives.base import Objective, Times
from mmgen.objectives.draw import check_modalities
from mmgen.objectives.flow_matching import FlowMatching, FlowMatchingConfig
from mmgen.objectives.imm import IMM, IMMConfig
from mmgen.objectives.path import Path

ObjectiveConfig = FlowMatchingConfig | IMMConfig


def build_objective(config: ObjectiveConfig) -> Objective:
    """The objective that a config names."""
    return IMM(config) if isinstance(config, IMMConfig) else FlowMatching(config)


__all__ = [
    "IMM",
    "FlowMatching",
    "FlowMatchingConfig",
    "IMMConfig",
    "Objective",
    "ObjectiveConfig",
    "Path",
    "Times",
    "build_objective",
    "check_modalities",
]
