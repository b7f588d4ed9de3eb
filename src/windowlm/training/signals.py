"""SIGINT, SIGTERM, SIGUSR1 and SIGUSR2 over the whole of a run."""

import multiprocessing
import os
import signal
import sys
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

from windowlm.parallel.place import own_place

# What SLURM sends before the end of a job's time: as sbatch --signal=USR1@90 asks for it, or submitit.
OF_TIME = (signal.SIGUSR1, signal.SIGUSR2)
WATCHED = (signal.SIGINT, signal.SIGTERM, *OF_TIME)
SHOW_CURSOR = b"\x1b[?25h"


class Interrupted(BaseException):
    """The run ends here, with nothing to finish first.

    No ``Exception``, so that no library takes it for a failure of its own.
    """


class Signals:
    """Catch the signals while the context is open.

    Where ``deferred`` is set the first signal is only noted, and whoever set it ends the work in an orderly
    way; elsewhere it raises ``Interrupted`` at once. A second SIGINT leaves at once in any case. Processes
    that are forked meanwhile take no notice: Ctrl-C reaches them too, and it is their parent who ends them.
    Python cannot raise from a finalizer that a signal falls into, and would print a traceback; the signal is
    noted all the same, and the next ``check`` raises.

    Attributes:
        received: what to tell the user about the first signal; None before it.
        requeues: whether one of the end of a job's time has come.
        deferred: whether a first signal waits.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.requeues = False
        self.deferred = False
        self._process = os.getpid()
        self._before: dict[int, Any] = {}
        self._unraisable_before = sys.unraisablehook

    def __enter__(self) -> Self:
        self._unraisable_before, sys.unraisablehook = sys.unraisablehook, self._pass_over
        self._before = {number: signal.getsignal(number) for number in WATCHED}
        for number in WATCHED:
            signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            # None is one that was not set by Python, and cannot be set again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        sys.unraisablehook = self._unraisable_before

    def check(self) -> None:
        """Raise ``Interrupted`` if a signal has come."""
        if self.received is not None:
            raise Interrupted(self.received)

    def _pass_over(self, unraisable: "sys.UnraisableHookArgs") -> None:
        if not isinstance(unraisable.exc_value, Interrupted):
            self._unraisable_before(unraisable)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return
        self.requeues = self.requeues or number in OF_TIME
        if self.received is not None:
            if number == signal.SIGINT:
                leave_at_once(128 + number)
            return
        self.received = f"{signal.Signals(number).name} received"
        if not self.deferred:
            raise Interrupted(self.received)


def leave_at_once(status: int) -> NoReturn:
    """End the process where it stands, as a kill would.

    An exception would pass through Lightning and W&B, which finish what they can on the way. Here the
    terminal gets its cursor back, and the processes that load data end, which hold the screen open too.
    """
    with suppress(OSError, ValueError):
        for child in multiprocessing.active_children():
            child.kill()
    with suppress(OSError):
        if os.isatty(1):
            os.write(1, SHOW_CURSOR)
        if own_place().speaks:
            os.write(2, b"stopped at once; what was saved before stays, and resume=auto goes on from there\n")
    os._exit(status)
