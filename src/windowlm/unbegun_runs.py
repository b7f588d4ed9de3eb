"""Leaves nothing behind of a run that does not begin: a plan, a mistake in the data, an interruption.

Hydra writes its record of a run before the run can look at its data. A run that then writes nothing into its
folder has not begun, and its record and the folders made for it are removed again.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class UnbegunRuns:
    """Watches one command's runs.

    Args:
        folder: the run's folder, or that of a sweep's runs, as it is before Hydra writes.
        sweep_record: name of the file that Hydra writes into the folder of a sweep.
    """

    def __init__(self, folder: Path, sweep_record: str) -> None:
        self._folder = folder.absolute()
        self._missing = [path for path in (self._folder, *self._folder.parents) if not path.exists()]
        self._entries = set(self._folder.iterdir()) if self._folder.is_dir() else set()
        self._sweep_record = self._folder / sweep_record
        self._earlier_record = self._sweep_record.read_bytes() if self._sweep_record.is_file() else None
        self._begun = False

    @contextmanager
    def run(self, folder: Path, record: str | None) -> Iterator[None]:
        """One run: its record goes if nothing was written beside it.

        Args:
            folder: the run's own.
            record: name of the folder that Hydra wrote into it; None for none.
        """
        before = _states(folder)
        try:
            yield
        finally:
            if _states(folder) != before:
                self._begun = True
            elif record is not None:
                shutil.rmtree(folder / record)

    @contextmanager
    def all(self) -> Iterator[None]:
        """All runs of the command: folders that were made for them and are empty go."""
        try:
            yield
        finally:
            if not self._begun and self._earlier_record is not None:
                self._sweep_record.write_bytes(self._earlier_record)
            elif not self._begun:
                self._sweep_record.unlink(missing_ok=True)
            children = set(self._folder.iterdir()) if self._folder.is_dir() else set()
            for path in (*(children - self._entries), *self._missing):
                with suppress(OSError):  # a file, or not empty
                    path.rmdir()


def _states(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
