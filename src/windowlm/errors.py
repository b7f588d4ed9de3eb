"""The error of a user's mistake; commands show its message alone and exit with status 2."""

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

USAGE_ERROR = 2
INTERRUPTED_BY_USER = 130  # 128 + SIGINT, as a shell reports it
READER_GONE = 141  # 128 + SIGPIPE
CREDENTIALS = re.compile(r"(?<=://)[^\s/@'\"]+@")


class UserError(ValueError):
    """A setting, path or file that cannot be used.

    The message says what was given, what is allowed and which key to change. Of addresses that others' errors
    quote in it, user names and passwords are left out.
    """

    def __init__(self, message: str) -> None:
        super().__init__(CREDENTIALS.sub("", message))


def lacks_memory(error: BaseException) -> UserError | None:
    """What to tell the user where an error says that device or machine has no room; None where not.

    Loads no torch, whose error on a GPU is known by its name.
    """
    said = str(error)
    if not isinstance(error, MemoryError) and not (
        isinstance(error, RuntimeError)
        and (type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in said)
    ):
        return None
    asked = re.search(r"tried to allocate [\d.,]+ ?\w+|unable to allocate [\d.,]+ ?\w+", said, re.I)
    found = f" ({asked[0]})" if asked else ""
    return UserError(
        f"not enough memory{found}; try fewer sequences at a time (data.batch_size, with "
        "trainer.accumulate_batches instead; evaluation.batch_tokens; batch_size), shorter ones, or a "
        "smaller model"
    )


@contextmanager
def memory_as_a_mistake() -> Iterator[None]:
    """Within it a lack of memory is the user's mistake."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if (lacking := lacks_memory(error)) is None:
            raise
        raise lacking from None


def exit_status(command: Callable[[], int]) -> int:
    """Status of a command: its own, 2 after a user's mistake, 130 after Ctrl-C; both print one message."""
    try:
        with memory_as_a_mistake():
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
