"""The files of an evaluation: its result as JSON, CSV and PNG, the targets and their losses."""

import csv
import io
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from windowlm.atomic_write import json_bytes, write_atomically
from windowlm.errors import UserError
from windowlm.evaluation.result import FORMAT, LengthResult
from windowlm.evaluation.target_losses import LOSSES_NAME, TargetLosses, write_losses
from windowlm.evaluation.targets import TargetSet
from windowlm.json_text import has_text, is_count, is_number, parse_json

RESULT_NAME = "length.json"
PLOT_NAME = "length.png"
OWN_EVALUATION = "evaluation"


def evaluation_name(data: Mapping[str, Any]) -> str:
    """Folder, in a run's, of the evaluation of some data: ``evaluation`` of the run's own.

    Args:
        data: settings of the documents. With ``path`` or ``name`` they are not the run's own, and the folder
            is called after the last part of the path that has a name, or after the data set.
    """
    if "path" not in data and "name" not in data:
        return OWN_EVALUATION
    path = Path(data["path"]) if "path" in data else Path(data["name"])
    names = (re.sub(r"[^\w.-]+", "_", part).strip("_.") for part in (path.stem, *reversed(path.parts[:-1])))
    return f"{OWN_EVALUATION}_{next(filter(None, names), 'other')}"


def write_results(
    folder: Path,
    result: LengthResult,
    targets: TargetSet,
    losses: TargetLosses,
    pictures: Mapping[str, bytes],
) -> Path | None:
    """Write an evaluation; ``length.json`` comes last, so a folder that has it is complete.

    A different result that the folder already holds is moved to ``earlier/001`` (002, ...) in it.

    Args:
        folder: made where it does not exist.
        result: what ``length_sweep`` returned.
        targets: its targets.
        losses: nats of each of them.
        pictures: by name, ``length.png`` and the page.

    Returns:
        Where an earlier result was moved, or None.

    Raises:
        UserError: the folder cannot be written.
    """
    files = {
        "length.csv": csv_of_rows(flat_rows(result)).encode(),
        **pictures,
        "targets.json": json_bytes(
            {"format": FORMAT, "hash": targets.hash, "documents": targets.byte_ranges}
        ),
        RESULT_NAME: json_bytes(result),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        earlier = keep_earlier(folder, [*files, LOSSES_NAME], RESULT_NAME, files[RESULT_NAME])
        write_losses(folder / LOSSES_NAME, losses)
        for name, content in files.items():
            write_atomically(folder / name, content)
    except OSError as error:
        raise UserError(
            f"{folder}: the result cannot be written: {error.strerror}: {error.filename}"
        ) from None
    return earlier


def read_result(run: Path, evaluation: str = OWN_EVALUATION) -> LengthResult:
    """Result of a run folder.

    Args:
        run: the folder.
        evaluation: which of its evaluations.

    Raises:
        UserError: the file is missing, damaged or of another format.
    """
    path = run / evaluation / RESULT_NAME
    advice = f"; write it with: {evaluate_command(run, evaluation)}"
    if not path.is_file():
        raise UserError(f"{path}: there is no such file, so this run is not evaluated{advice}")
    try:
        result: LengthResult = parse_json(path.read_text(encoding="utf-8"))
        complete = _is_complete(result)
    except (ValueError, KeyError, TypeError, AttributeError):
        complete = False
    if not complete:
        raise UserError(f"{path}: damaged, or not the result of an evaluation of this version{advice}")
    return result


def _is_complete(result: LengthResult) -> bool:
    """Whether it holds what comparisons read; values that later versions added may be missing.

    Raises:
        KeyError, TypeError, AttributeError: it does not.
    """
    rows, documents = result["rows"], result["documents"]
    lengths = [str(row["context_length"]) for row in rows]
    measured = ("bits_per_byte", "nats", "perplexity")
    numbers: list[object] = [row[name] for row in rows for name in measured]  # type: ignore[literal-required]
    numbers += [document["nats"][length] for document in documents for length in lengths]
    counted = ("context_length", "targets", "bytes")
    counts: list[object] = [row[name] for row in rows for name in counted]  # type: ignore[literal-required]
    counts += [document["bytes"] for document in documents]
    texts: list[object] = [result["targets_hash"], result["tokenizer_identity"], result["precision"]]
    texts += [document["document_hash"] for document in documents]
    texts += [document["author"] for document in documents if document["author"] is not None]
    return (
        result["format"] == FORMAT
        and bool(rows and documents)
        and result["cluster"] in ("author", "document")
        and all(map(is_number, numbers))
        and all(map(is_count, counts))
        and all(isinstance(text, str) for text in texts)
        and all(isinstance(row["extrapolation"], bool) for row in rows)
        and is_number(result["parameters"], 0)
        and (result["tokens_trained"] is None or is_number(result["tokens_trained"], 0))
        and has_text(result)
    )


def evaluate_command(run: Path, evaluation: str = OWN_EVALUATION) -> str:
    """The command that writes an evaluation of a run, as a shell takes it; ``TEXT`` stands for other data."""
    command = f"python scripts/evaluate.py {shlex.quote(f'checkpoint={run}')}"
    return command if evaluation == OWN_EVALUATION else f"{command} data.path=TEXT"


def flat_rows(result: LengthResult) -> list[dict[str, Any]]:
    """Rows without nesting, for tables."""
    rows = []
    for row in result["rows"]:
        flat: dict[str, Any] = dict(row)
        change = flat.pop("change_from_shortest") or {}
        flat |= {f"change_{name}": change.get(name) for name in ("mean", "low", "high")}
        equal = flat.pop("equal_to_longest") or {}
        flat |= {f"equal_to_longest_{name}": equal.get(name) for name in ("p", "p_holm", "equivalent")}
        rows.append(flat)
    return rows


def csv_of_rows(rows: list[dict[str, Any]]) -> str:
    """CSV with a column for each key that occurs; None and a key that a row lacks are empty cells."""
    text = io.StringIO()
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, fieldnames=columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def keep_earlier(folder: Path, names: Sequence[str], result_name: str, content: bytes) -> Path | None:
    """Move files to ``earlier/001`` (002, ...) where their result is not to be written again as it is.

    Args:
        folder: where they are.
        names: those of the evaluation, the result's among them.
        result_name: file that tells one evaluation from another.
        content: what is to be written there.

    Returns:
        Where they went, or None.
    """
    result = folder / result_name
    if not result.is_file() or result.read_bytes() == content:
        return None
    taken = [int(entry.name) for entry in folder.glob("earlier/*") if entry.name.isdecimal()]
    earlier = folder / "earlier" / f"{max(taken, default=0) + 1:03d}"
    earlier.mkdir(parents=True)
    # The result goes first: what is left is then no complete evaluation.
    for name in sorted(names, key=lambda name: name != result_name):
        if (folder / name).exists():
            (folder / name).rename(earlier / name)
    return earlier
