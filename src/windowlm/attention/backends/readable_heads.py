"""Heads that lie in memory as kernels of other packages read them."""

import torch
from torch import Tensor

READ_AT_ONCE = 8  # numbers of 16 bits


def aligned(tensor: Tensor) -> Tensor:
    """The same with the numbers of a head side by side, from a multiple of `READ_AT_ONCE` in its storage on.

    A graph that is compiled knows no place in a storage, only the steps within it.
    """
    steps = [step for step, size in zip(tensor.stride()[:-1], tensor.shape[:-1], strict=True) if size > 1]
    start = 0 if torch.compiler.is_compiling() else tensor.storage_offset()
    if tensor.stride(-1) == 1 and not any(step % READ_AT_ONCE for step in (start, *steps)):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
