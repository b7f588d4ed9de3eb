"""Why and when a run stops: budget, wall-clock limit, signals. Always between two steps."""

import signal
import time
from types import FrameType
from typing import Any

import lightning.pytorch as pl

from windowlm.training.lightning_module import LanguageModelModule

INTERRUPTED = 75  # EX_TEMPFAIL: saved, to be started again


class Stopping(pl.Callback):
    """Keep the run's clock and end the loop.

    A first SIGINT or SIGTERM lets the step finish and saves; a second SIGINT leaves at once.

    Args:
        max_time: seconds from ``started`` after which the run stops; None for no limit.
        started: ``time.monotonic()`` at the start of the command.

    Attributes:
        reason: why the run stopped before its budget was spent; None while it goes on or is finished.
    """

    def __init__(self, max_time: float | None, started: float) -> None:
        self.max_time = max_time
        self.started = started
        self.reason: str | None = None
        self._before: dict[int, Any] = {}
        self._clock = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the signals over from Lightning, which exits without saving."""
        assert isinstance(pl_module, LanguageModelModule)
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._on_signal)
        self._clock = time.monotonic() - pl_module.seconds_trained

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """Stop after the step that spends the budget, reaches the limit or follows a signal."""
        pl_module.seconds_trained = time.monotonic() - self._clock
        if pl_module.batches_trained % pl_module.accumulate_batches:
            return
        if pl_module.budget.progress(pl_module.spent()) >= 1:
            self.reason = None
            trainer.should_stop = True
        elif self.max_time is not None and time.monotonic() - self.started >= self.max_time:
            self.reason = f"trainer.max_time={self.max_time:g} seconds reached"
            trainer.should_stop = True
        elif self.reason is not None:
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the signals back."""
        self._release()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Give the signals back."""
        self._release()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.reason is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.reason = f"{signal.Signals(number).name} received"

    def _release(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
