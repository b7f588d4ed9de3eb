"""An ablation for readers: a table for the terminal, JSON, and loss against seconds and against bytes."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from windowlm.atomic_write import json_bytes, write_atomically
from windowlm.evaluation.ablation import Cell, Effect, effects, read_cells
from windowlm.evaluation.report import add_columns, as_text, png

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

NAME = "ablation"
# What a reader needs to know of the first run, as far as its record says it.
PROVENANCE = ("command", "device", "git_commit", "python", "machine", "versions")
SHOWN_FROM = 0.1  # share of a curve left out at its start, where all fall steeply


def report_ablation(folder: Path, console: "Console") -> None:
    """Print the table of a sweep over changes and seeds, and write ``ablation.json`` and ``.png`` there.

    Args:
        folder: where the runs are; the settings of the first are the base.
        console: where to print.

    Raises:
        UserError: no run there, or the runs scored different text.
    """
    cells = read_cells(folder)
    found = effects(cells)
    console.print(_table(cells[0], found))
    unfinished = sum(cell.unfinished for cell in cells)
    if unfinished:
        console.print(f"{unfinished} runs are not finished; the same command with resume=auto goes on.")
    files = {
        folder / f"{NAME}.json": json_bytes(_as_json(folder, cells[0], found)),
        folder / f"{NAME}.png": _plot(cells),
    }
    for path, content in files.items():
        write_atomically(path, content)
        console.out(shlex.quote(str(path)), highlight=False)


def _table(base: Cell, found: Sequence[Effect]) -> "Table":
    from rich import box
    from rich.table import Table

    legend = (
        "bits/byte: of the evaluation's longest context, the mean over seeds and its standard deviation; "
        "difference: to the base, below zero is better; p: Welch's test, then after Holm's correction over "
        "the table."
    )
    table = Table(caption=legend, box=box.SIMPLE_HEAD, pad_edge=False, caption_justify="left")
    names = ["change", "runs", "bits/byte", "deviation", "difference", "p", "p (Holm)", "parameters", "MB"]
    add_columns(table, names, left=1)
    table.add_row(*map(as_text, _row(base, "", "", "")))
    for effect in sorted(found, key=lambda effect: (effect.difference is None, effect.difference or 0.0)):
        difference = "" if effect.difference is None else f"{effect.difference:+.4f}"
        row = _row(effect.cell, difference, _p_text(effect.p), _p_text(effect.p_holm))
        table.add_row(*map(as_text, row))
    return table


def _row(cell: Cell, difference: str, p: str, p_holm: str) -> list[str]:
    return [
        cell.label,
        str(len(cell.scores)),
        "" if cell.mean is None else f"{cell.mean:.4f}",
        "" if cell.deviation is None else f"{cell.deviation:.4f}",
        difference,
        p,
        p_holm,
        "" if cell.parameters is None else f"{cell.parameters:,}",
        "" if cell.bytes_trained is None else f"{cell.bytes_trained / 1e6:,.1f}",
    ]


def _p_text(p: float | None) -> str:
    return "" if p is None else f"{p:.2g}"


def _as_json(folder: Path, base: Cell, found: Sequence[Effect]) -> dict[str, Any]:
    path = next(iter(sorted(folder.glob("*/run.json"))), None)
    record = {} if path is None else json.loads(path.read_text(encoding="utf-8"))
    return {
        "first_run": {name: record[name] for name in PROVENANCE if name in record},
        "base": {"mean": base.mean, "deviation": base.deviation, **asdict(base)},
        "cells": [
            {
                "difference": effect.difference,
                "p": effect.p,
                "p_holm": effect.p_holm,
                "mean": effect.cell.mean,
                "deviation": effect.cell.deviation,
                **asdict(effect.cell),
            }
            for effect in found
        ],
    }


def _plot(cells: Sequence[Cell]) -> bytes:
    import altair as alt

    panels = []
    for title, places, values in (
        ("seconds", "seconds", "bits_at_seconds"),
        ("bytes trained on", "bytes", "bits_at_bytes"),
    ):
        points = [
            {"cell": cell.label, "place": place, "bits": bits}
            for cell in cells
            if cell.curve is not None
            for place, bits in _later(getattr(cell.curve, places), getattr(cell.curve, values))
        ]
        chart = alt.Chart(alt.Data(values=points)).mark_line(strokeWidth=1.2)
        panels.append(
            chart.encode(
                alt.X("place:Q", title=title, axis=alt.Axis(format="~s", grid=False)),
                alt.Y("bits:Q", title="bits per byte (training)", scale=alt.Scale(zero=False)),
                alt.Color(
                    "cell:N",
                    title=None,
                    sort=[cell.label for cell in cells],
                    scale=alt.Scale(scheme="category20"),
                    legend=alt.Legend(columns=2, symbolType="stroke"),
                ),
            ).properties(width=360, height=300)
        )
    return png(alt.hconcat(*panels, title=alt.Title("Loss in equal time and on equal text", anchor="start")))


def _later(places: Sequence[float], values: Sequence[float]) -> list[tuple[float, float]]:
    first = int(SHOWN_FROM * len(places))
    return list(zip(places[first:], values[first:], strict=True))
