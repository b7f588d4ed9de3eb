"""Leaves nothing behind of a run that does not begin: a plan, a mistake in the data, an interruption.

Hydra writes its record of a run before the run can look at its data. A run that then writes nothing into its
folder has not begun, and its record and the folders made for it are removed again.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path


def free_name(path: Path) -> Path:
    """``path``, or ``path-2`` and so on where that exists."""
    names = (path if number == 1 else path.with_name(f"{path.name}-{number}") for number in count(1))
    return next(name for name in names if not name.exists())


class UnbegunRuns:
    """Watches one command's runs.

    Args:
        folder: the run's folder, or that of a sweep's runs, as it is before Hydra writes.
        sweep_record: name of the file that Hydra writes into the folder of a sweep.

    Attributes:
        folder: the folder.
    """

    def __init__(self, folder: Path, sweep_record: str) -> None:
        self.folder = folder
        self._folder = folder.absolute()
        self._missing = [path for path in (self._folder, *self._folder.parents) if not path.exists()]
        self._entries = set(self._folder.iterdir()) if self._folder.is_dir() else set()
        self._sweep_record = self._folder / sweep_record
        self._earlier_record = self._sweep_record.read_bytes() if self._sweep_record.is_file() else None
        self._begun = False

    @classmethod
    def in_new_folder(cls, path: Path, sweep_record: str) -> "UnbegunRuns":
        """Make the folder, under the next free name where another command was faster, and watch it.

        Raises:
            OSError: it cannot be made.
        """
        while True:
            runs = cls(free_name(path), sweep_record)
            try:
                runs.folder.mkdir(parents=True)
            except FileExistsError:
                continue
            return runs

    def have_begun(self) -> None:
        """Runs took place in other processes, and what they left stays."""
        self._begun = True

    @contextmanager
    def run(self, folder: Path, record: str | None) -> Iterator[None]:
        """One run: its record goes if nothing was written beside it, and its folder if that leaves it empty.

        Args:
            folder: the run's own.
            record: name of the folder that Hydra wrote into it; None for none.
        """
        before = _states(folder)
        try:
            yield
        finally:
            after = _states(folder)
            if after is None or after != before:
                self._begun = True
            else:
                if record is not None:
                    # What cannot be removed must not take the place of what ended the run.
                    shutil.rmtree(folder / record, ignore_errors=True)
                if folder.absolute() not in {self._folder, *self._entries}:
                    _remove_empty(folder)

    @contextmanager
    def all(self, records: str) -> Iterator[None]:
        """All runs of the command: the folders above them go where they were made for them and are empty.

        Args:
            records: pattern of the names of the folders that Hydra writes into those of runs. Those that it
                could not write, as on a full disk, go too where nothing lies beside them.
        """
        earlier = self._records(records)
        try:
            yield
        except BaseException:
            for record in self._records(records) - earlier:
                self._remove_torn(record)
            raise
        finally:
            if not self._begun and self._earlier_record is not None:
                self._sweep_record.write_bytes(self._earlier_record)
            elif not self._begun:
                self._sweep_record.unlink(missing_ok=True)
            for path in self._missing:
                _remove_empty(path)

    def _records(self, pattern: str) -> set[Path]:
        return {*self._folder.glob(pattern), *self._folder.glob(f"*/{pattern}")}

    def _remove_torn(self, record: Path) -> None:
        own = record.parent
        beside = self._entries if own == self._folder else set()
        if {*own.iterdir()} - {record} <= beside:
            shutil.rmtree(record, ignore_errors=True)
            if own not in {self._folder, *self._entries}:
                _remove_empty(own)


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # not empty, or not there
        folder.rmdir()


def _states(folder: Path) -> dict[str, int] | None:
    """When each entry changed, links themselves and not what they lead to; None where the folder is gone."""
    states = {}
    try:
        for path in folder.iterdir():
            with suppress(FileNotFoundError):  # of another process, which has removed it meanwhile
                states[path.name] = path.lstat().st_mtime_ns
    except OSError:
        return None
    return states
