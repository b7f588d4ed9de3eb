"""The error of a user's mistake; commands show its message alone and exit with status 2."""

import errno
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

USAGE_ERROR = 2
INTERRUPTED_BY_USER = 130  # 128 + SIGINT, as a shell reports it
READER_GONE = 141  # 128 + SIGPIPE
CREDENTIALS = re.compile(r"(?<=://)[^\s/@'\"]+@")

# Of disks, rights and names, and hardly of a bug, as a file that is missing may be.
OF_THE_SYSTEM = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.ESTALE,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EISDIR,
    errno.ENOTDIR,
}


class UserError(ValueError):
    """A setting, path or file that cannot be used.

    The message says what was given, what is allowed and which key to change. Of addresses that others' errors
    quote in it, user names and passwords are left out.
    """

    def __init__(self, message: str) -> None:
        super().__init__(CREDENTIALS.sub("", message))


class SystemRefusedError(UserError):
    """A file that the system does not let this process read or write, whatever other processes may."""


def refused_by_the_system(error: BaseException) -> SystemRefusedError | None:
    """What to tell the user where the system refused a file or the screen; None where it may be a bug."""
    if not isinstance(error, OSError) or error.errno not in OF_THE_SYSTEM:
        return None
    if error.filename is None:
        return unwritable_screen(error)
    name = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename
    return SystemRefusedError(f"{name}: {error.strerror}; give another, or see to it that it can be used")


def unwritable_screen(error: OSError) -> SystemRefusedError | None:
    """The error of a standard stream, where one cannot be written, which the system does not say."""
    if not (names := silence_unwritable()):
        return None
    return SystemRefusedError(f"{' and '.join(names)}: {error.strerror}; send it elsewhere")


def silence_unwritable() -> list[str]:
    """Names of the standard streams that cannot be written; they are silenced.

    An empty line tells whether standard output can be, as nothing need be left of what could not be written.
    """
    silenced = []
    streams = (("standard output", sys.stdout, "\n"), ("standard error", sys.stderr, ""))
    for name, stream, trial in streams:
        if stream is None:  # as of a process that was started without one
            continue
        try:
            stream.write(trial)
            stream.flush()
        except OSError:
            silence(stream)
            silenced.append(name)
    return silenced


def silence(stream: TextIO) -> None:
    """Let what a standard stream holds, and gets, go nowhere.

    Otherwise the end of the process would fail on it once more, with a status of its own.
    """
    with suppress(OSError, ValueError):  # as of one that has no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        stream.flush()


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
        "trainer.accumulate_batches instead; evaluation.batch_tokens; batch_size), shorter ones "
        "(data.sequence_length; max_new_tokens), or a smaller model"
    )


@contextmanager
def limits_as_mistakes() -> Iterator[None]:
    """Within it a lack of memory, of room on a disk and of rights is the user's mistake."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if (mistake := lacks_memory(error) or refused_by_the_system(error)) is None:
            raise
        raise mistake from None


def _flush_screen() -> None:
    """Have what is still to be written fail here, where it is told."""
    if sys.stdout is not None:
        sys.stdout.flush()


def exit_status(command: Callable[[], int]) -> int:
    """Status of a command: its own, 2 after a user's mistake, 130 after Ctrl-C; both print one message.

    141 without a word where nobody reads standard output any more.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        # `train.py` set it for the time of its imports.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with limits_as_mistakes():
            try:
                status = command()
            except SystemExit:  # as after --help
                _flush_screen()
                raise
            _flush_screen()
            return status
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED_BY_USER
    except BrokenPipeError:
        # As of `| head`.
        silence_unwritable()
        return READER_GONE
    except SystemExit as left:
        # Rich ends the process itself, with 1.
        if not isinstance(left.__context__, BrokenPipeError):
            raise
        return READER_GONE
