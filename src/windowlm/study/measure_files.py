"""Files of the measures, in ``study`` beside ``length.json``: each as JSON, CSV and PNG."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from windowlm.atomic_write import json_bytes, write_atomically
from windowlm.errors import UserError
from windowlm.evaluation.report import png
from windowlm.evaluation.result import LengthResult
from windowlm.evaluation.result_files import csv_of_rows, keep_earlier
from windowlm.json_text import has_text, is_count, is_number, parse_json
from windowlm.study.config import Measure
from windowlm.study.measure_charts import measure_charts
from windowlm.study.measure_result import FORMAT, MeasureResult

STUDY_FOLDER = "study"


def write_measure(folder: Path, result: MeasureResult) -> Path | None:
    """Write a measure; its JSON comes last, so that where it is the measure is complete.

    A different result that is there moves to ``earlier/001`` (002, ...).

    Args:
        folder: of the evaluation.
        result: the measure's.

    Returns:
        Where an earlier result was moved, or None.
    """
    place, name = folder / STUDY_FOLDER, result["measure"]
    files = {f"{name}.csv": csv_of_rows(result["rows"]).encode()}
    charts = measure_charts(result)
    if charts:
        files[f"{name}.png"] = png(charts[0].properties(width=420, height=260))
    content = json_bytes(result)
    earlier = keep_earlier(
        place, [f"{name}.{kind}" for kind in ("csv", "png", "json")], f"{name}.json", content
    )
    for file, written in {**files, f"{name}.json": content}.items():
        write_atomically(place / file, written)
    return earlier


def read_measure(folder: Path, name: str) -> MeasureResult | None:
    """A measure of an evaluation, None where it is not made.

    Raises:
        UserError: the file is damaged or of another format.
    """
    path = folder / STUDY_FOLDER / f"{name}.json"
    if not path.is_file():
        return None
    try:
        result: MeasureResult = parse_json(path.read_text(encoding="utf-8"))
        sound = result["format"] == FORMAT and result["measure"] == name and _is_complete(result)
    except (ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise UserError(
            f"{path}: damaged, or not a measure of this version; nothing was overwritten: move it away and "
            "run the command again"
        )
    return result


def _is_complete(result: MeasureResult) -> bool:
    """Whether it holds what comparisons read.

    Raises:
        KeyError, TypeError, AttributeError, ValueError: it does not.
    """
    name, rows, clusters = result["measure"], result["rows"], result["clusters"]
    if not all(isinstance(each, list) for each in (rows, clusters)) or not isinstance(
        result["settings"], dict
    ):
        return False
    if not all(isinstance(row, dict) for row in (*rows, *clusters)) or not has_text(result):
        return False
    if name == "far_repeats":
        sizes = [row[key] for row in rows for key in ("bytes", "context_length")]
        if not all(is_number(size, 0) for size in sizes) or not all(is_number(row["nats"]) for row in rows):
            return False
    return all(isinstance(row["cluster"], str) and _is_figure(name, row) for row in clusters)


def _is_figure(name: str, row: Mapping[str, Any]) -> bool:
    """Whether an author's row of a measure has its figures."""
    if name == "pasted_spans":
        return isinstance(row["span"], str) and is_count(row["distance"]) and is_number(row["saved"])
    if name == "forced_choice":
        return is_count(row["distance"]) and is_count(row["questions"]) and is_number(row["right"], 0)
    if name not in ("far_repeats", "key_words"):
        return True
    nats = row["nats"]
    if not nats or not is_count(row["bytes"]) or not all(map(is_count, map(int, nats))):
        return False
    if not all(map(is_number, nats.values())):
        return False
    if name == "key_words":
        return isinstance(row["chooser"], str)
    return is_count(row["distance_from"]) and (row["distance_to"] is None or is_count(row["distance_to"]))


def is_of(measured: MeasureResult, result: LengthResult) -> bool:
    """Whether a measure belongs to an evaluation's result, and not to an earlier one in the same folder."""
    settings, lengths = measured["settings"], [row["context_length"] for row in result["rows"]]
    return (
        settings.get("targets_hash") == result["targets_hash"]
        and result.get("weights") in (None, settings.get("model"))
        and settings.get("context_lengths", lengths) == lengths
        and settings.get("precision", result["precision"]) == result["precision"]
    )


def measures_of(folder: Path, result: LengthResult) -> list[MeasureResult]:
    """All measures of an evaluation that belong to its result.

    Raises:
        UserError: a file is damaged.
    """
    return [measured for measured in measures_in(folder) if is_of(measured, result)]


def measures_in(folder: Path) -> list[MeasureResult]:
    """All measures of an evaluation, in the order in which they are explained.

    Raises:
        UserError: a file is damaged.
    """
    found = [read_measure(folder, name) for name in get_args(Measure)]
    return [result for result in found if result is not None]
