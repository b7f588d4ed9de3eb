"""How commands end."""

import errno
import os
import sys

import numpy
import pytest
import torch
from rich.console import Console

from windowlm.errors import UserError, exit_status


def fail(error):
    raise error


@pytest.mark.parametrize(
    ("command", "status", "printed"),
    [
        (lambda: 75, 75, ""),
        (lambda: fail(UserError("data.path: empty")), 2, "error: data.path: empty\n"),
        (lambda: fail(KeyboardInterrupt()), 130, "interrupted\n"),
        (lambda: torch.empty(2**60), 2, "tried to allocate 4611686018427387904 bytes"),
        (lambda: numpy.empty(2**58), 2, "Unable to allocate 2.00 EiB"),
        (
            lambda: fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0")),
            2,
            "not enough memory (Tried to allocate 2.00 GiB); try fewer sequences",
        ),
        (lambda: fail(MemoryError()), 2, "error: not enough memory; try fewer"),
    ],
)
def test_a_command_ends_with_a_status_and_one_message(command, status, printed, capsys):
    assert exit_status(command) == status
    screen = capsys.readouterr()
    assert screen.out == ""
    assert screen.err == printed or (len(printed) > 20 and printed in screen.err)
    assert screen.err.count("\n") == bool(printed)


def refuse(number, *names):
    raise OSError(number, os.strerror(number), *names)


def test_what_the_system_refuses_ends_with_one_message(capsys):
    assert exit_status(lambda: refuse(errno.EACCES, "a/b")) == 2
    assert capsys.readouterr().err.startswith("error: a/b: Permission denied; ")


@pytest.mark.parametrize("at_once", [True, False])
def test_a_screen_that_is_full_is_named(at_once, monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert exit_status(lambda: print("text", flush=at_once) or 0) == 2
        full.flush()  # as at the end of the process, where it must not fail again
    assert capsys.readouterr().err == "error: standard output: No space left on device; send it elsewhere\n"


@pytest.mark.parametrize("printing", [print, lambda text: Console().print(text)])
def test_a_reader_that_is_gone_is_no_mistake(printing, monkeypatch, capsys):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert exit_status(lambda: printing("text") or 0) == 141
        pipe.flush()
    assert not capsys.readouterr().err


def test_a_bug_is_not_hidden():
    with pytest.raises(FileNotFoundError):
        exit_status(lambda: refuse(errno.ENOENT, "a/b"))
    with pytest.raises(PermissionError):
        exit_status(lambda: refuse(errno.EACCES))
    with pytest.raises(SystemExit, match="3"):
        exit_status(lambda: sys.exit(3))
    with pytest.raises(RuntimeError, match="shapes"):
        exit_status(lambda: fail(RuntimeError("shapes differ")))
    with pytest.raises(ZeroDivisionError):
        exit_status(lambda: 1 // 0)
