"""Refuse what is no dense tensor, by the name of its argument."""

import torch
from torch import Tensor


def check_dense(name: str, tensor: object) -> None:
    """Raise ValueError for what is no tensor, and for tensors without plain strides (sparse, nested)."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} is a {type(tensor).__name__}: a torch tensor is allowed")
    if tensor.layout != torch.strided or tensor.is_nested:
        raise ValueError(f"{name} is sparse or nested: a dense tensor is allowed; try {name}.to_dense()")
