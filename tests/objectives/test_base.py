"""What the two kinds of objectives share, and that neither has the other's loss."""

import pytest
import torch

from mmgen.objectives import IMM, FlowMatching, FlowMatchingConfig, IMMConfig


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_each_kind_of_objective_has_its_own_loss():
    imm, flow = IMM(IMMConfig()), FlowMatching(FlowMatchingConfig())
    assert imm.needs_target and imm.particles == 4 and not flow.needs_target and flow.particles == 1
    x = torch.zeros(1, 4, 8)
    with pytest.raises(NotImplementedError, match="IMM is `group_loss`"):
        imm.token_loss(x, x, x)
    with pytest.raises(NotImplementedError, match="FlowMatching is `token_loss`"):
        flow.group_loss(x, x, x, x, column(0.5), column(0.0), column(0.2))
