"""Autocast switched off, for products that must not be rounded."""

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """A region of the tensors' own dtypes; the meta device knows no autocast that could be switched off.

    Nothing is entered where autocast is off: torch does not keep a compiled graph on disk that enters it.
    """
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
