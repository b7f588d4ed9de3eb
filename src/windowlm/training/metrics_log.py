"""``metrics.jsonl``: one JSON object a logged step, the record that everything else is rebuilt from."""

import json
import math
from pathlib import Path
from typing import Any

from windowlm.atomic_write import write_atomically
from windowlm.evaluation.result_files import csv_of_rows

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

    Args:
        path: the file; made on the first row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: dict[str, Any]) -> None:
        """Write one row; it is in the file when this returns."""
        assert "step" in row
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_without_nan(row), allow_nan=False) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """All rows; a last line that a kill left unfinished is not one."""
        if not self.path.exists():
            return []
        rows = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
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
