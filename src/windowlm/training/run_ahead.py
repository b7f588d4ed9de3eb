"""How far the host may run ahead of the device."""

from collections import deque
from typing import Any

import lightning.pytorch as pl
import torch

MOST_BATCHES = 2


class RunAhead(pl.Callback):
    """Keep the host at most two batches ahead of a GPU: enough that it never waits for work, and few enough
    that the run's clocks, which are the host's, tell what the GPU has done.
    """

    def __init__(self) -> None:
        self._begun: deque[torch.cuda.Event] = deque()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Wait for the batch before the last two."""
        if pl_module.device.type != "cuda":
            return
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._begun.append(event)
        if len(self._begun) > MOST_BATCHES:
            self._begun.popleft().synchronize()
