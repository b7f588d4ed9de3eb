"""Why and when training stops: budget, wall-clock limit, signals. Always between two steps."""

import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

from windowlm.training.signals import Signals

INTERRUPTED = 75  # EX_TEMPFAIL: saved, to be started again


class Stopping(pl.Callback):
    """Keep the run's clock and end the loop.

    When the budget is spent the run is validated and saved. When it stops before, for the limit or a signal,
    it is saved at once: a validation could outlast whatever wants the process to end. A validation that is
    due at that very step takes place, or a resumed run would lack it; one that is due at a time does not.

    Args:
        signals: inside their context; while the loop runs a first one waits for the end of the step.
        max_time: seconds from ``started`` after which training stops; None for no limit. Each start of a run
            trains at least one step, so that a run that is started again and again gets somewhere.
        started: ``time.monotonic()`` at the start of the command.
        validates_after: tells whether a validation is known to be due after this step.

    Attributes:
        reason: why training stopped before the budget was spent; None while it goes on or is finished.
    """

    def __init__(
        self,
        signals: Signals,
        max_time: float | None,
        started: float,
        validates_after: Callable[[int], bool],
    ) -> None:
        self.signals = signals
        self.max_time = max_time
        self.started = started
        self.validates_after = validates_after
        self.reason: str | None = None
        self._clock = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Take the signals back from Lightning, which would exit without saving."""
        self.signals.take()
        self.signals.deferred = True
        self._clock = time.monotonic() - pl_module.seconds_trained

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """Stop after the step that spends the budget, reaches the limit or follows a signal."""
        pl_module.seconds_trained = time.monotonic() - self._clock
        step, rest = divmod(pl_module.batches_trained, pl_module.accumulate_batches)
        if rest:
            return
        if pl_module.finished:
            trainer.should_stop = True
        elif self._wants_to_stop():
            trainer.should_stop = True
            if not self.validates_after(step):
                trainer.limit_val_batches = 0

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Stop after a validation in which the limit was reached or a signal came."""
        if trainer.state.fn == "fit" and not pl_module.finished and self._wants_to_stop():
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """From here on there is no step to finish."""
        self.signals.deferred = False

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """The same."""
        self.signals.deferred = False

    def _wants_to_stop(self) -> bool:
        if self.signals.received is not None:
            self.reason = self.signals.received
        elif self.max_time is not None and time.monotonic() - self.started >= self.max_time:
            self.reason = f"trainer.max_time={self.max_time:g} seconds reached"
        return self.reason is not None
