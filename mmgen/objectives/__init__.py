"""Training objectives for continuous modalities, over one path and one jump, and the loss of text."""

from mmgen.objectives.base import Objective, Times
from mmgen.objectives.flow_matching import FlowMatching, FlowMatchingConfig
from mmgen.objectives.imm import IMM, IMMConfig
from mmgen.objectives.path import Path
from mmgen.objectives.text import text_loss

ObjectiveConfig = FlowMatchingConfig


def build_objective(config: ObjectiveConfig) -> Objective:
    """The objective that a config names."""
    return FlowMatching(config)


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
    "text_loss",
]
