"""Heads that lie in memory as kernels of other packages read them."""

from typing import Any

import torch
from torch import Tensor

READ_AT_ONCE = 8  # numbers of 16 bits


def aligned(tensor: Tensor) -> Tensor:
    """The same with the numbers of a head side by side, from a multiple of `READ_AT_ONCE` in its storage on.

    Heads of another size begin where they may if they lie as a copy of them would. A graph that is compiled
    knows no place in a storage, only the steps within it.
    """
    steps = [step for step, size in zip(tensor.stride()[:-1], tensor.shape[:-1], strict=True) if size > 1]
    start = 0 if torch.compiler.is_compiling() else tensor.storage_offset()
    readable = tensor.is_contiguous() or (
        tensor.stride(-1) == 1 and not any(step % READ_AT_ONCE for step in steps)
    )
    if readable and start % READ_AT_ONCE == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def with_aligned_gradient(tensor: Tensor) -> Tensor:
    """The same, whose gradient goes on `aligned` however it lay in memory."""
    passed: Tensor = _AlignedGradient.apply(tensor)  # type: ignore[no-untyped-call]
    return passed


class _AlignedGradient(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def setup_context(context: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return aligned(gradient)
