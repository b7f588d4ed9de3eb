"""Numbers that leave the device while it works on."""

from collections.abc import Sequence

import torch
from torch import Tensor


class DeferredNumbers:
    """Numbers of a device, asked for now and read later, so that the host need not wait.

    Args:
        tensors: on one device, of any shapes; whole numbers are exact up to 2**53.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        flat = [tensor.detach().to(torch.float64).flatten() for tensor in tensors]
        numbers = flat[0] if len(flat) == 1 else torch.cat(flat)
        self._event: torch.cuda.Event | None = None
        self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=numbers.is_cuda)
        self._numbers.copy_(numbers, non_blocking=True)
        if numbers.is_cuda:
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    @property
    def arrived(self) -> bool:
        """Whether reading takes no waiting."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def read(self) -> list[float]:
        """The numbers of one tensor after the other, waited for where they have not arrived."""
        if self._event is not None:
            self._event.synchronize()
        numbers: list[float] = self._numbers.tolist()
        return numbers
