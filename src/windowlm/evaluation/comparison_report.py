"""Compared runs for readers: tables for the terminal, a CSV and a plot."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from windowlm.atomic_write import write_atomically
from windowlm.errors import UserError
from windowlm.evaluation.comparison import (
    ABSENT,
    PairedLength,
    Run,
    differing_settings,
    paired_lengths,
    read_run,
    runs_in,
)
from windowlm.evaluation.report import COLORS, context_axis, interval_text, png
from windowlm.evaluation.result import LengthResult, Row
from windowlm.evaluation.result_files import csv_of_rows

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

CSV_NAME, PLOT_NAME = "comparison.csv", "comparison.png"
# Drawn as color, line style and panel, in this order; more settings than these are told apart by run.
DRAWN_SETTINGS = 3
DASHES = [[1, 0], [6, 3], [2, 2], [8, 2, 2, 2]]


def compare_folder(folder: Path, console: "Console") -> None:
    """Print a table of the runs in ``folder`` and write its CSV and plot there.

    Raises:
        UserError: no evaluated run in the folder.
    """
    runs = runs_in(folder)
    evaluated = [(run, run.result) for run in runs if run.result is not None]
    if not evaluated:
        raise UserError(
            f"{folder}: none of its {len(runs)} runs is evaluated; let one end, or write its result with: "
            f"python scripts/evaluate.py checkpoint={runs[0].folder}"
        )
    keys = differing_settings(runs)
    console.print(_runs_table(folder, runs, keys))
    if len({result["targets_hash"] for _, result in evaluated}) > 1:
        console.print("The runs did not all score the same text: compare them with care, and two by two.")
    if len({result["tokenizer_identity"] for _, result in evaluated}) > 1:
        console.print("Their tokenizers differ: compare bits per byte, not perplexities.")
    write_atomically(folder / CSV_NAME, csv_of_rows(_csv_rows(folder, evaluated, keys)).encode())
    write_atomically(folder / PLOT_NAME, _plot(folder, evaluated, keys))
    console.print(f"{folder / CSV_NAME}\n{folder / PLOT_NAME}", highlight=False, soft_wrap=True)


def compare_two(first: Path, second: Path, console: "Console") -> None:
    """Print what differs in the settings of two runs, and their paired difference at each context length.

    Raises:
        UserError: not two evaluated runs, or they scored different text.
    """
    one, two = read_run(first), read_run(second)
    console.print(_settings_table(one, two))
    pairs = paired_lengths(one, two)
    console.print(_paired_table(pairs))


def setting_text(value: Any) -> str:
    """A setting as it is written on the command line."""
    if isinstance(value, list):
        return "[" + ",".join(map(setting_text, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _runs_table(folder: Path, runs: Sequence[Run], keys: Sequence[str]) -> "Table":
    from rich import box
    from rich.table import Table

    results = [run.result for run in runs if run.result is not None]
    lengths = sorted({row["context_length"] for result in results for row in result["rows"]})
    table = Table(
        title=f"{folder}: bits per byte, perplexity below it, by context length",
        caption="* windows of 2c are longer than training sequences" if _any_extrapolation(results) else None,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
    )
    for heading in ("run", *keys, "parameters", "tokens", *(f"{c:,}" for c in lengths)):
        table.add_column(heading, justify="left" if heading in ("run", *keys) else "right")
    for run in runs:
        cells = [_name(folder, run), *(setting_text(run.settings.get(key, ABSENT)) for key in keys)]
        if run.result is None:
            table.add_row(*cells, "unfinished")
            continue
        tokens = run.result["tokens_trained"]
        rows = {row["context_length"]: row for row in run.result["rows"]}
        table.add_row(
            *cells,
            f"{run.result['parameters']:,}",
            "" if tokens is None else f"{tokens:,}",
            *(_cell(rows[c]) if c in rows else "" for c in lengths),
        )
    return table


def _cell(row: Row) -> str:
    return f"{row['bits_per_byte']:.4f}{'*' if row['extrapolation'] else ''}\n{row['perplexity']:.2f}"


def _any_extrapolation(results: Sequence[LengthResult]) -> bool:
    return any(row["extrapolation"] for result in results for row in result["rows"])


def _settings_table(first: Run, second: Run) -> "Table":
    from rich.table import Table

    keys = differing_settings([first, second])
    table = Table(title="settings that differ", title_justify="left")
    for heading in ("setting", str(first.folder), str(second.folder)):
        table.add_column(heading, overflow="fold")
    for key in keys:
        table.add_row(key, *(setting_text(run.settings.get(key, ABSENT)) for run in (first, second)))
    if not keys:
        table.add_row("(none)", "", "")
    return table


def _paired_table(pairs: Sequence[PairedLength]) -> "Table":
    from rich.table import Table

    caption = f"difference: mean over {pairs[0].difference['pairs']:,} documents of second - first, paired"
    if any(pair.extrapolation for pair in pairs):
        caption += "; * windows of 2c are longer than training sequences"
    table = Table(title="bits per byte", caption=caption, title_justify="left", caption_justify="left")
    for heading in ("context", "first", "second", "difference ± 95%"):
        table.add_column(heading, justify="right")
    for pair in pairs:
        table.add_row(
            f"{pair.context_length:,}{'*' if pair.extrapolation else ''}",
            f"{pair.first:.4f}",
            f"{pair.second:.4f}",
            interval_text(pair.difference),
        )
    return table


def _csv_rows(
    folder: Path, evaluated: Sequence[tuple[Run, LengthResult]], keys: Sequence[str]
) -> list[dict[str, Any]]:
    return [
        {
            "run": _name(folder, run),
            **{key: setting_text(run.settings.get(key, ABSENT)) for key in keys},
            "parameters": result["parameters"],
            "tokens_trained": result["tokens_trained"],
            "context_length": row["context_length"],
            "targets": row["targets"],
            "bytes": row["bytes"],
            "nats": row["nats"],
            "perplexity": row["perplexity"],
            "bits_per_byte": row["bits_per_byte"],
            "extrapolation": row["extrapolation"],
            "targets_hash": result["targets_hash"],
        }
        for run, result in evaluated
        for row in result["rows"]
    ]


def _plot(folder: Path, evaluated: Sequence[tuple[Run, LengthResult]], keys: Sequence[str]) -> bytes:
    import altair as alt

    varied = [
        key for key in keys if len({setting_text(run.settings.get(key, ABSENT)) for run, _ in evaluated}) > 1
    ]
    if not 0 < len(varied) <= DRAWN_SETTINGS:
        varied = []
    points = [
        {
            "run": _name(folder, run),
            "c": row["context_length"],
            "bits": row["bits_per_byte"],
            **{f"setting{n}": setting_text(run.settings.get(key, ABSENT)) for n, key in enumerate(varied)},
        }
        for run, result in evaluated
        for row in result["rows"]
    ]
    values = [list(dict.fromkeys(point[f"setting{n}"] for point in points)) for n in range(len(varied))]
    legend = alt.Legend(symbolType="stroke", symbolSize=300, symbolStrokeWidth=2)
    chart = alt.Chart(alt.Data(values=points)).encode(
        context_axis(alt, [row["context_length"] for _, result in evaluated for row in result["rows"]]),
        alt.Y("bits:Q", title="bits per byte", scale=alt.Scale(zero=False, padding=8)),
        alt.Detail("run:N"),
        alt.Color(
            "setting0:N" if varied else "run:N",
            title=varied[0] if varied else "run",
            sort=values[0] if varied else [_name(folder, run) for run, _ in evaluated],
            scale=alt.Scale(range=COLORS),
            legend=legend,
        ),
    )
    lines, marks = chart.mark_line(), chart.mark_point(filled=True, size=35, opacity=1)
    if len(varied) > 1:
        dashes = alt.Scale(range=DASHES)
        lines = lines.encode(
            alt.StrokeDash("setting1:N", title=varied[1], sort=values[1], scale=dashes, legend=legend)
        )
    drawn = (lines + marks).properties(width=300, height=260)
    if len(varied) > 2:
        drawn = drawn.facet(column=alt.Column("setting2:N", title=varied[2], sort=values[2]))
    return png(drawn.properties(title=alt.Title("Loss by context length", anchor="start")))


def _name(folder: Path, run: Run) -> str:
    return "." if run.folder == folder else str(run.folder.relative_to(folder))
