"""How commands end."""

import pytest

from windowlm.errors import UserError, exit_status


def fail(error):
    raise error


@pytest.mark.parametrize(
    ("command", "status", "printed"),
    [
        (lambda: 75, 75, ""),
        (lambda: fail(UserError("data.path: empty")), 2, "error: data.path: empty\n"),
        (lambda: fail(KeyboardInterrupt()), 130, "interrupted\n"),
    ],
)
def test_a_command_ends_with_a_status_and_one_message(command, status, printed, capsys):
    assert exit_status(command) == status
    assert capsys.readouterr() == ("", printed)


def test_a_bug_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        exit_status(lambda: 1 // 0)
