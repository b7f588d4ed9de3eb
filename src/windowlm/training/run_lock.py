"""One process at a time writes a run's folder."""

import fcntl
import os
import sys
from pathlib import Path

from windowlm.errors import UserError
from windowlm.training.run_folder import LOCK


class RunLock:
    """The lock of a run's folder, held until it is released or the process has ended in whatever way.

    Two that trained in one folder, as where a job came back from a queue beside one that still runs, would
    write each row of the metrics twice, and each the checkpoints of the other. POSIX's locks are those of one
    process: the ones that load its data, which may outlive it by seconds, do not hold them.

    Args:
        folder: the run's.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: int | None = None

    def take(self) -> None:
        """Hold it; the folder is there.

        Raises:
            OSError: the folder cannot be written.
            UserError: another process holds it.
        """
        self._file = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self.release()
            raise UserError(
                f"run_dir={self.folder}: another process is training in it; wait for its end, or stop it and "
                "go on with resume=auto"
            ) from None
        except OSError as error:  # as of some file systems of networks, which have no locks
            print(
                f"warning: {self.folder / LOCK}: cannot be locked ({error.strerror}); start no second "
                "process in this folder",
                file=sys.stderr,
            )

    def release(self) -> None:
        """Let others have it."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
