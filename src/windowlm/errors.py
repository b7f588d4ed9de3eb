"""The error of a user's mistake; commands show its message alone and exit with status 2."""

import os
import sys
from collections.abc import Callable

USAGE_ERROR = 2
INTERRUPTED_BY_USER = 130  # 128 + SIGINT, as a shell reports it
READER_GONE = 141  # 128 + SIGPIPE


class UserError(ValueError):
    """A setting, path or file that cannot be used.

    The message says what was given, what is allowed and which key to change.
    """


def exit_status(command: Callable[[], int]) -> int:
    """Status of a command: its own, 2 after a user's mistake, 130 after Ctrl-C; both print one message."""
    try:
        return command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED_BY_USER
    except BrokenPipeError:
        # As of `| head`. What is still to be written at the end must go somewhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE
