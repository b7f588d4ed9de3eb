"""The files of an evaluation: ``length.json``, ``length.csv``, ``length.png`` and ``targets.json``."""

import csv
import io
import json
from pathlib import Path
from typing import Any

from windowlm.atomic_write import write_atomically
from windowlm.errors import UserError
from windowlm.evaluation.result import FORMAT, LengthResult
from windowlm.evaluation.targets import TargetSet

RESULT_NAME = "length.json"


def write_results(folder: Path, result: LengthResult, targets: TargetSet, plot: bytes) -> Path | None:
    """Write an evaluation; ``length.json`` comes last, so a folder that has it is complete.

    A different result that the folder already holds is moved to ``earlier/001`` (002, ...) in it.

    Args:
        folder: made where it does not exist.
        result: what ``length_sweep`` returned.
        targets: its targets.
        plot: PNG of the result.

    Returns:
        Where an earlier result was moved, or None.
    """
    files = {
        "length.csv": csv_of_rows(flat_rows(result)).encode(),
        "length.png": plot,
        "targets.json": _json({"format": FORMAT, "hash": targets.hash, "documents": targets.byte_ranges}),
        RESULT_NAME: _json(result),
    }
    folder.mkdir(parents=True, exist_ok=True)
    earlier = _keep_earlier(folder, files)
    for name, content in files.items():
        write_atomically(folder / name, content)
    return earlier


def read_result(run: Path) -> LengthResult:
    """Result of a run folder.

    Raises:
        UserError: the file is missing, damaged or of another format.
    """
    path = run / "evaluation" / RESULT_NAME
    advice = f"; write it with: python scripts/evaluate.py checkpoint={run}"
    if not path.is_file():
        raise UserError(f"{path}: there is no such file, so this run is not evaluated{advice}")
    try:
        result: LengthResult = json.loads(path.read_text(encoding="utf-8"))
        complete = result["format"] == FORMAT and bool(result["rows"]) and bool(result["documents"])
    except (ValueError, KeyError, TypeError):
        complete = False
    if not complete:
        raise UserError(f"{path}: damaged, or not the result of an evaluation of this version{advice}")
    return result


def flat_rows(result: LengthResult) -> list[dict[str, Any]]:
    """Rows without nesting, for tables."""
    rows = []
    for row in result["rows"]:
        flat: dict[str, Any] = dict(row)
        change = flat.pop("change_from_shortest") or {}
        flat |= {f"change_{name}": change.get(name) for name in ("mean", "low", "high")}
        rows.append(flat)
    return rows


def csv_of_rows(rows: list[dict[str, Any]]) -> str:
    """CSV with the first row's keys as header; None is an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _keep_earlier(folder: Path, files: dict[str, bytes]) -> Path | None:
    result = folder / RESULT_NAME
    if not result.is_file() or result.read_bytes() == files[RESULT_NAME]:
        return None
    taken = [int(entry.name) for entry in folder.glob("earlier/*") if entry.name.isdecimal()]
    earlier = folder / "earlier" / f"{max(taken, default=0) + 1:03d}"
    earlier.mkdir(parents=True)
    # The result goes first: what is left is then no complete evaluation.
    for name in reversed(files):
        if (folder / name).exists():
            (folder / name).rename(earlier / name)
    return earlier
