"""``metrics.jsonl``: one JSON object a logged step, the record that everything else is rebuilt from."""

import json
import math
import os
from pathlib import Path
from typing import Any

from windowlm.atomic_write import sync_path, write_atomically
from windowlm.errors import UserError
from windowlm.evaluation.result_files import csv_of_rows
from windowlm.json_text import parse_json

# Columns that depend on the clock or the machine; all others are the same in a run that is repeated.
WALL_CLOCK_COLUMNS = (
    "seconds",
    "tokens_per_second",
    "model_flops_per_second",
    "mfu",
    "peak_memory_bytes",
    "data_wait_fraction",
)


class MetricsLog:
    """Append rows to a file of JSON lines, each written whole.

    Rows that cannot be written are kept, and written before the next one.

    Args:
        path: the file; made on the first row.
        writes: False for a process that leaves the file to another.
        held: rows that are in the file.

    Attributes:
        count: rows in the file, and those that are kept.
    """

    def __init__(self, path: Path, *, writes: bool = True, held: int = 0) -> None:
        self.path = path
        self.writes = writes
        self.count = held
        self._unwritten: list[bytes] = []
        self._name_synced = False

    def append(self, row: dict[str, Any]) -> None:
        """Write one row; it is in the file when this returns.

        Raises:
            OSError: the file is as it was, and the row is kept.
        """
        assert "step" in row
        if not self.writes:
            return
        self.count += 1
        self._unwritten.append(json.dumps(_without_nan(row), allow_nan=False).encode() + b"\n")
        self.write_all()

    def write_all(self, *, sync: bool = False) -> None:
        """Write the rows that are kept, if any.

        Args:
            sync: wait until all rows are on the disk.

        Raises:
            OSError: the file is as it was.
        """
        if not self.writes:
            return
        if not self._unwritten and not (sync and self.path.exists()):
            return
        with self.path.open("ab", buffering=0) as file:
            length = file.tell()
            content = b"".join(self._unwritten)
            try:
                while content:
                    content = content[file.write(content) :]
                if sync:
                    os.fsync(file.fileno())
                    if not self._name_synced:
                        sync_path(self.path.parent)
                        self._name_synced = True
            except OSError:
                file.truncate(length)
                raise
        self._unwritten.clear()

    def rows(self) -> list[dict[str, Any]]:
        """All rows; a last line that a kill left unfinished is not one.

        Raises:
            UserError: a line before the last is damaged.
        """
        if not self.path.exists():
            return []
        rows = []
        lines = self.path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, start=1):
            try:
                row = parse_json(line)
                step = row.get("step") if isinstance(row, dict) else None
                if type(step) is not int or step < 0:  # a boolean is an int too
                    raise ValueError("no row")
                rows.append(row)
            except ValueError:  # of JSON or of UTF-8
                if number < len(lines):
                    raise UserError(
                        f"{self.path}: line {number} is damaged; mend it, or remove the file's lines from "
                        "there on and go on without their history"
                    ) from None
        return rows

    def cut_back(self, step: int) -> list[dict[str, Any]]:
        """Drop what was logged after ``step``, where a resumed run goes on; returns what stays."""
        kept = [row for row in self.rows() if row["step"] <= step]
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in kept).encode())
        return kept

    def write_csv(self, path: Path) -> None:
        """The same rows as a table, one column for each name that occurs."""
        write_atomically(path, csv_of_rows(self.rows()).encode())


def _without_nan(row: dict[str, Any]) -> dict[str, Any]:
    """The row as JSON can say it, which knows no NaN and no infinity."""
    unknown = {name for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
    return {name: None if name in unknown else value for name, value in row.items()}
