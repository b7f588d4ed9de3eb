import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn

import pytest

from windowlm.training.signals import Interrupted, Signals


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_ends_what_has_nothing_to_finish(number: signal.Signals) -> None:
    with pytest.raises(Interrupted, match=f"{number.name} received"), Signals():
        send(number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_deferred_signal_is_only_noted(number: signal.Signals) -> None:
    with Signals() as signals:
        signals.deferred = True
        send(number)
        assert signals.received == f"{number.name} received"
        with pytest.raises(Interrupted):
            signals.check()


class LeftError(Exception):
    """Stands for the end of the process."""


def leave(status: int) -> NoReturn:
    raise LeftError(status)


def test_a_second_interrupt_leaves_at_once_and_a_second_termination_does_not(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
    child.start()
    with Signals() as signals:
        signals.deferred = True
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        monkeypatch.setattr("os._exit", leave)
        with pytest.raises(LeftError, match="130"):
            send(signal.SIGINT)
    assert capfd.readouterr().err.startswith("stopped at once")
    # A process that loads data has ended too.
    child.join()
    assert child.exitcode == -signal.SIGKILL


def test_the_handlers_of_before_come_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Signals():
        assert signal.getsignal(signal.SIGINT) is not before[0]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_forked_process_takes_no_notice() -> None:
    with Signals():
        child = os.fork()
        if child == 0:
            send(signal.SIGINT)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


class Finalized:
    def __init__(self, end: Callable[[], object]) -> None:
        self.end = end

    def __del__(self) -> None:
        self.end()


def test_a_signal_that_falls_into_a_finalizer_is_noted_and_not_printed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    printed: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: printed.append(unraisable.exc_type))
    before = sys.unraisablehook
    with Signals() as signals:
        Finalized(lambda: signal.raise_signal(signal.SIGTERM))
        Finalized(lambda: {}["missing"])
        with pytest.raises(Interrupted, match="SIGTERM received"):
            signals.check()
    assert printed == [KeyError]
    assert sys.unraisablehook is before
