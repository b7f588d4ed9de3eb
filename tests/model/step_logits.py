"""The logits of a step themselves as its outcome."""

from collections.abc import Iterator

import torch


class Logits:
    """Gives what it is given."""

    def __call__(self, logits_BV: torch.Tensor) -> torch.Tensor:
        return logits_BV

    def moving_state(self) -> Iterator[torch.Tensor]:
        return iter(())
