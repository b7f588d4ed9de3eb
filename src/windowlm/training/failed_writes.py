"""What a run does when its folder cannot be written: it stops, or says so and goes on."""

import errno
import os
import sys
from pathlib import Path
from typing import Literal

from windowlm.errors import UserError

# Of a disk or folder, not of a bug.
UNWRITABLE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EFBIG,
    errno.EIO,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.ESTALE,
}


class FailedWrites:
    """The policy of one run.

    Args:
        policy: ``stop`` ends the run at the first failure, ``go_on`` warns and tries again when the next
            write is due.
        folder: the run's folder.
        speaks: whether this process is the one that warns.
    """

    def __init__(self, policy: Literal["stop", "go_on"], folder: Path, *, speaks: bool = True) -> None:
        self.policy = policy
        self.speaks = speaks
        self.folder = folder

    def report(self, what: str, error: OSError, *, is_last: bool = False) -> None:
        """Say what could not be written.

        Args:
            what: the file or state.
            error: why.
            is_last: no later write will make up for it.

        Raises:
            UserError: the policy is to stop, or it is the last.
        """
        if self.policy == "stop" or is_last:
            raise unwritable(self.folder, what, error) from None
        if self.speaks:
            print(f"warning: {what}: {reason(self.folder, error)}; the run goes on", file=sys.stderr)

    def require_folder(self) -> None:
        """Raise FileNotFoundError where the folder is gone: a new one in its place would hold half a run."""
        if not self.folder.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.folder))


def unwritable(folder: Path, what: str, error: OSError) -> UserError:
    """The error that ends a run whose folder cannot be written."""
    return UserError(
        f"{what}: {reason(folder, error)}, so the run stops. What was saved before is whole; when the folder "
        "can be written again, resume=auto goes on from it, and checkpoint.on_failed_write=go_on would go on "
        "training meanwhile"
    )


def reason(folder: Path, error: OSError) -> str:
    """Why a write below ``folder`` failed."""
    if not folder.is_dir():
        return f"the run's folder {folder} is gone"
    return f"cannot be written to {folder}: {error.strerror or error}"
