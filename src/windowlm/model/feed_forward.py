"""Gated feed-forward network (SwiGLU, Shazeer 2020, arXiv:2002.05202).

Shape letters: B batch, T sequence, D model width, F hidden width.
"""

import torch
import torch.nn.functional as F
from torch import nn

from windowlm.attention.joint_projection import project_jointly


class FeedForward(nn.Module):
    """``down(silu(gate(x)) * up(x))``, without biases; maps ``[B, T, D]`` to the same shape."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden_dim, bias=False)
        self.up = nn.Linear(dim, hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Apply the network to each position on its own."""
        gate_BTF, up_BTF = project_jointly(hidden_BTD, (self.gate, self.up))
        output_BTD: torch.Tensor = self.down(F.silu(gate_BTF) * up_BTF)
        return output_BTD
