"""Feed-forward network: SwiGLU, or ReLU squared without a gate.

Shape letters: B batch, T sequence, D model width.
"""

import torch
import torch.nn.functional as F
from torch import nn

from windowlm.model.config import Activation


class FeedForward(nn.Module):
    """Two or three matrices without biases; maps ``[B, T, D]`` to the same shape.

    ``swiglu`` is ``down(silu(gate(x)) * up(x))`` (Shazeer 2020, arXiv:2002.05202), ``relu_squared`` is
    ``down(relu(up(x)) ** 2)`` (Primer, So et al. 2021, arXiv:2109.08668).
    """

    def __init__(self, dim: int, hidden_dim: int, activation: Activation = "swiglu") -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden_dim, bias=False) if activation == "swiglu" else None
        self.up = nn.Linear(dim, hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Apply the network to each position on its own."""
        up = self.up(hidden_BTD)
        activated = F.relu(up).square() if self.gate is None else F.silu(self.gate(hidden_BTD)) * up
        output_BTD: torch.Tensor = self.down(activated)
        return output_BTD
