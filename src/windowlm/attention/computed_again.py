"""What a compiled backward pass computes again instead of reading it from memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def computed_again(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """The function's value; a compiled backward pass keeps its arguments alone and computes it there again.

    For what takes less time to compute than to write and read, such as sums and products of each number.
    """
    if not (torch.compiler.is_compiling() and torch.is_grad_enabled()):
        return function(*arguments)
    value: Tensor = checkpoint(function, *arguments, use_reentrant=False)
    return value
