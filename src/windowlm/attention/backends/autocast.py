"""Autocast switched off, for products that must not be rounded."""

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """A region of the tensors' own dtypes; the meta device knows no autocast that could be switched off."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
