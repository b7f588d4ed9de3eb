"""Files of the measures, in ``study`` beside ``length.json``: each as JSON, CSV and PNG."""

import json
from pathlib import Path
from typing import get_args

from windowlm.atomic_write import json_bytes, write_atomically
from windowlm.errors import UserError
from windowlm.evaluation.report import png
from windowlm.evaluation.result_files import csv_of_rows, keep_earlier
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
        result: MeasureResult = json.loads(path.read_text(encoding="utf-8"))
        sound = result["format"] == FORMAT and result["measure"] == name
        sound = sound and isinstance(result["settings"], dict) and isinstance(result["rows"], list)
    except (ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        raise UserError(
            f"{path}: damaged, or not a measure of this version; nothing was overwritten: move it away and "
            "run the command again"
        )
    return result


def measures_in(folder: Path) -> list[MeasureResult]:
    """All measures of an evaluation, in the order in which they are explained.

    Raises:
        UserError: a file is damaged.
    """
    found = [read_measure(folder, name) for name in get_args(Measure)]
    return [result for result in found if result is not None]
