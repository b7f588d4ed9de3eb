"""Why and when training stops: budget, wall-clock limit, signals. Always between two steps."""

import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch

from windowlm.parallel.processes import ALONE, Processes
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
        processes: all stop at the same step, as soon as one wants to, and go by the leader's clock.

    Attributes:
        reason: why training stopped before the budget was spent; None while it goes on or is finished.
    """

    def __init__(
        self,
        signals: Signals,
        max_time: float | None,
        started: float,
        validates_after: Callable[[int], bool],
        processes: Processes = ALONE,
    ) -> None:
        self.processes = processes
        self.signals = signals
        self.max_time = max_time
        self.started = started
        self.validates_after = validates_after
        self.reason: str | None = None
        self._clock = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """From here on a signal waits for the end of the step."""
        self.signals.deferred = True
        self._clock = time.monotonic() - pl_module.seconds_trained

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """Stop after the step that spends the budget, reaches the limit or follows a signal."""
        seconds, wants_to_stop = self._agreed(time.monotonic() - self._clock)
        pl_module.seconds_trained = seconds
        step, rest = divmod(pl_module.batches_trained, pl_module.accumulate_batches)
        if rest:
            return
        if pl_module.finished:
            trainer.should_stop = True
        elif wants_to_stop:
            trainer.should_stop = True
            if not self.validates_after(step):
                trainer.limit_val_batches = 0

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Stop after a validation in which the limit was reached or a signal came."""
        if trainer.state.fn == "fit" and not pl_module.finished and self._agreed(0.0)[1]:
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """From here on there is no step to finish."""
        self.signals.deferred = False

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """The same."""
        self.signals.deferred = False

    def _agreed(self, seconds: float) -> tuple[float, bool]:
        """The leader's clock, and whether any process wants to stop."""
        if self.processes.size == 1:
            return seconds, self._wants_to_stop()
        own = [seconds if self.processes.leads else 0.0, self._wants_to_stop(), self.signals.requeues]
        told = self.processes.largest(torch.tensor(own, dtype=torch.float64))
        clock, wants_to_stop, requeues = told.tolist()
        if requeues:  # one that has come to this process meanwhile is told to the others next time
            self.signals.requeues = True
        if wants_to_stop and self.reason is None:
            self.reason = "another process of the run received a signal"
        return clock, bool(wants_to_stop)

    def _wants_to_stop(self) -> bool:
        if self.signals.received is not None:
            self.reason = self.signals.received
        else:
            self.reason = reached_limit(self.max_time, self.started)
        return self.reason is not None


def keep_signals(trainer: pl.Trainer) -> None:
    """Have Lightning leave signals alone, which `Signals` receives and `Stopping` tells to all processes.

    Its own handler of SIGTERM would exit without saving, or wait for the others in the middle of anything.
    And before each batch it asks the leader's GPU whether one has come, for which all wait until their GPUs
    have done the work so far (its issue 21487).
    """
    for owner, name in (
        (trainer._signal_connector, "register_signal_handlers"),
        (trainer.fit_loop.epoch_loop, "_broadcast_sigterm_tensor"),
    ):
        assert hasattr(owner, name), f"this Lightning has no {name}"
        setattr(owner, name, lambda: None)


def reached_limit(max_time: float | None, started: float) -> str | None:
    """What to tell where the wall-clock limit is reached, None before it.

    Args:
        max_time: seconds; None for no limit.
        started: what ``time.monotonic()`` gave when they began.
    """
    if max_time is None or time.monotonic() - started < max_time:
        return None
    return f"trainer.max_time={max_time:g} seconds reached"
