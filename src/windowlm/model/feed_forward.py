"""Feed-forward network: SwiGLU, or ReLU squared without a gate.

Shape letters: B batch, T sequence, D model width, F hidden width.
"""

import torch
import torch.nn.functional as F
from torch import nn

from windowlm.attention.computed_again import computed_again
from windowlm.attention.joint_projection import WithJointWeights, lay_side_by_side, project_jointly
from windowlm.model.config import Activation


class FeedForward(WithJointWeights):
    """Two or three matrices without biases; maps ``[B, T, D]`` to the same shape.

    ``swiglu`` is ``down(silu(gate(x)) * up(x))`` (Shazeer 2020, arXiv:2002.05202), ``relu_squared`` is
    ``down(relu(up(x)) ** 2)`` (Primer, So et al. 2021, arXiv:2109.08668).
    """

    def __init__(self, dim: int, hidden_dim: int, activation: Activation = "swiglu") -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden_dim, bias=False) if activation == "swiglu" else None
        self.up = nn.Linear(dim, hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)

    def join_projections(self) -> None:
        """Keep the weights of gate and up in one tensor, as `SlidingWindowAttention.join_projections`."""
        if self.gate is not None:
            self._joint_weights = lay_side_by_side((self.gate, self.up))

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Apply the network to each position on its own."""
        if self.gate is None:
            activated_BTF = computed_again(_relu_squared, self.up(hidden_BTD))
        else:
            projected = project_jointly(hidden_BTD, (self.gate, self.up), self._joint_weights)
            activated_BTF = computed_again(_gated_silu, *projected)
        output_BTD: torch.Tensor = self.down(activated_BTF)
        return output_BTD


def _gated_silu(gate_BTF: torch.Tensor, up_BTF: torch.Tensor) -> torch.Tensor:
    return F.silu(gate_BTF) * up_BTF


def _relu_squared(up_BTF: torch.Tensor) -> torch.Tensor:
    return F.relu(up_BTF).square()
