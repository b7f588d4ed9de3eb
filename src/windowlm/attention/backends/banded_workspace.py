"""Memory for scores that each thread keeps, as fresh pages take as long as attention over 512 tokens."""

import threading
from math import prod

import torch
from torch import Tensor

# The most that a thread keeps, three of the longest runs in float32; the work on more outweighs fresh pages.
BYTES = 9 * 2**20
ALIGNMENT = 64
_kept = threading.local()


class Workspace:
    """Hands out tensors of a dtype, good until the same thread opens another workspace."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.used = dtype, 0

    def empty(self, *sizes: int) -> Tensor:
        """A contiguous tensor that holds any numbers."""
        stop = self.used + prod(sizes) * self.dtype.itemsize
        if stop > BYTES:
            return torch.empty(sizes, dtype=self.dtype, device="cpu")
        memory: Tensor | None = getattr(_kept, "memory", None)
        if memory is None or len(memory) < stop:
            # What is made in inference mode may not be written to outside of it.
            with torch.inference_mode(False):
                memory = _kept.memory = torch.empty(stop, dtype=torch.uint8, device="cpu")
        taken = memory[self.used : stop].view(self.dtype).view(sizes)
        self.used = -(-stop // ALIGNMENT) * ALIGNMENT
        return taken
