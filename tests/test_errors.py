"""How commands end."""

import numpy
import pytest
import torch

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


def test_a_bug_is_not_hidden():
    with pytest.raises(RuntimeError, match="shapes"):
        exit_status(lambda: fail(RuntimeError("shapes differ")))
    with pytest.raises(ZeroDivisionError):
        exit_status(lambda: 1 // 0)
