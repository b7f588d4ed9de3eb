"""Embeddings whose gradients are summed in float32.

Shapes: V rows of a table, D numbers of each.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NARROW = (torch.bfloat16, torch.float16)


class LookUpTable(nn.Embedding):
    """`torch.nn.Embedding` of V rows of D numbers.

    A CPU adds what a row's tokens bring to its gradient in the table's own dtype: where that is bfloat16, a
    sum over thousands of tokens stops growing, and gradients were seen to be off by 2%. Here they are summed
    in float32 and rounded once, as GPUs and compiled graphs do by themselves.
    """

    def forward(self, rows: Tensor) -> Tensor:
        """Those rows, [*rows.shape, D]."""
        weight_VD = self.weight
        if weight_VD.device.type == "cpu" and weight_VD.dtype in NARROW and torch.is_grad_enabled():
            return F.embedding(rows, weight_VD.float()).to(weight_VD.dtype)
        found: Tensor = super().forward(rows)
        return found
