"""Norm and scale of a whole gradient, in float32 at least.

A norm summed in bfloat16 is off by up to half a percent, and so would be a scale rounded to it.
"""

import torch
from torch import Tensor


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """Euclidean norm over all gradients, a scalar on their device of dtype float32 or wider."""
    dtype = torch.promote_types(gradients[0].dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, dtype=dtype)))
    return norm


def rescale_gradient(gradients: list[Tensor], scale: Tensor) -> None:
    """Multiply in place by ``scale``, a scalar tensor on the gradients' device; rounded once, at the end."""
    dtype = torch.promote_types(gradients[0].dtype, torch.float32)
    scale = scale.to(dtype)
    if gradients[0].dtype is dtype:
        torch._foreach_mul_(gradients, scale)
        return
    # A scalar tensor is rounded to the gradients' dtype before it is multiplied.
    for gradient in gradients:
        gradient.copy_(gradient.to(dtype) * scale)
