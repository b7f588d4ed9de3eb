"""Norm and scale of a whole gradient, in float32 at least.

A norm summed in bfloat16 is off by up to half a percent.
"""

import torch
from torch import Tensor


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """Euclidean norm over all gradients, a scalar on their device of dtype float32 or wider."""
    dtype = torch.promote_types(gradients[0].dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, dtype=dtype)))
    return norm


def rescale_gradient(gradients: list[Tensor], scale: Tensor) -> None:
    """Multiply gradients in float32 or wider by ``scale``, a scalar tensor on their device, in place."""
    assert gradients[0].dtype in (torch.float32, torch.float64)
    torch._foreach_mul_(gradients, scale.to(gradients[0].dtype))
