"""Autocast switched off, for products that must not be rounded."""

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast_is_on(device: torch.device) -> bool:
    """Whether products on the device are rounded; the meta device knows no autocast."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """A region of the tensors' own dtypes.

    Nothing is entered where autocast is off: torch does not keep a compiled graph on disk that enters it.
    """
    if not autocast_is_on(device):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
