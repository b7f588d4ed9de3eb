"""Compared runs for readers: tables for the terminal, a CSV and a plot."""

import shlex
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
from windowlm.evaluation.equivalence import LEVEL, MARGIN
from windowlm.evaluation.multiple_comparisons import holm
from windowlm.evaluation.report import (
    ARTICLES,
    COLORS,
    add_columns,
    as_text,
    context_axis,
    interval_text,
    png,
)
from windowlm.evaluation.result import LengthResult, Row
from windowlm.evaluation.result_files import OWN_EVALUATION, csv_of_rows, evaluate_command
from windowlm.setting_text import setting_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# Drawn as color, line style and panel, in this order; more settings than these are told apart by run.
DRAWN_SETTINGS = 3
DASHES = [[1, 0], [6, 3], [2, 2], [8, 2, 2, 2]]


def compare_folder(folder: Path, console: "Console", evaluation: str = OWN_EVALUATION) -> None:
    """Print a table of the runs in ``folder`` and write its CSV and plot there.

    Args:
        folder: where the runs are.
        console: where to print; the table is as wide at most.
        evaluation: which of the runs' evaluations; of another than their own the files are named after it.

    Raises:
        UserError: no evaluated run in the folder.
    """
    runs = runs_in(folder, evaluation)
    evaluated = [(run, run.result) for run in runs if run.result is not None]
    if not evaluated:
        raise UserError(
            f"{folder}: none of its {len(runs)} runs holds a result in {evaluation}/; let one end, or write "
            f"it with: {evaluate_command(runs[0].folder, evaluation)}"
        )
    keys = differing_settings(runs)
    console.out(shlex.quote(str(folder)), highlight=False)
    console.print(_runs_table(folder, runs, keys, console))
    if len({result["targets_hash"] for _, result in evaluated}) > 1:
        console.print("The runs did not all score the same text: compare them with care, and two by two.")
    if len({result["tokenizer_identity"] for _, result in evaluated}) > 1:
        console.print("Their tokenizers differ: compare bits per byte, not perplexities.")
    name = "comparison" + evaluation.removeprefix(OWN_EVALUATION)
    csv, plot = folder / f"{name}.csv", folder / f"{name}.png"
    write_atomically(csv, csv_of_rows(_csv_rows(folder, evaluated, keys)).encode())
    write_atomically(plot, _plot(folder, evaluated, keys))
    for path in (csv, plot):
        console.out(shlex.quote(str(path)), highlight=False)


def compare_two(first: Path, second: Path, console: "Console", evaluation: str = OWN_EVALUATION) -> None:
    """Print what differs in the settings of two runs, and their paired difference at each context length.

    Raises:
        UserError: not two evaluated runs, or they scored different text.
    """
    one, two = read_run(first, evaluation), read_run(second, evaluation)
    console.print(_settings_table(one, two))
    pairs = paired_lengths(one, two)
    assert one.result is not None
    console.print(_paired_table(pairs, one.result["cluster"]))


def _runs_table(folder: Path, runs: Sequence[Run], keys: Sequence[str], console: "Console") -> "Table":
    """All context lengths where they fit the console, else as many as do, the shortest and longest first."""
    results = [run.result for run in runs if run.result is not None]
    lengths = sorted({row["context_length"] for result in results for row in result["rows"]})
    shown = list(lengths)
    table = _table_of_lengths(folder, runs, keys, shown, omitted=False)
    while (
        console.measure(table, options=console.options.update(width=10_000)).maximum > console.width
        and len(shown) > 2
    ):
        shown.pop(len(shown) // 2)
        table = _table_of_lengths(folder, runs, keys, shown, omitted=True)
    return table


def _table_of_lengths(
    folder: Path, runs: Sequence[Run], keys: Sequence[str], lengths: Sequence[int], *, omitted: bool
) -> "Table":
    from rich import box
    from rich.table import Table

    results = [run.result for run in runs if run.result is not None]
    legend = [
        "By context length c: bits per byte, and the perplexity of a token below; a target sees c to 2c - 1 "
        "tokens."
    ]
    if _any_extrapolation(results):
        legend.append("* windows of 2c are longer than training sequences.")
    if omitted:
        legend.append("The CSV holds the lengths that have no room here.")
    table = Table(
        caption=as_text(" ".join(legend)),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        caption_justify="left",
    )
    names = [*(_short_key(key, keys) for key in keys), "parameters", "tokens"]
    add_columns(table, ["run", *names, *(f"{c:,}" for c in lengths)], left=1 + len(keys))
    for run in runs:
        cells = [_name(folder, run), *(setting_text(run.settings.get(key, ABSENT)) for key in keys)]
        if run.result is None:
            table.add_row(*map(as_text, cells), "unfinished")
            continue
        rows = {row["context_length"]: row for row in run.result["rows"]}
        table.add_row(
            *map(as_text, cells),
            _short_count(run.result["parameters"]),
            _short_count(run.result["tokens_trained"]),
            *(_cell(rows[c]) if c in rows else "" for c in lengths),
        )
    return table


def _short_key(key: str, keys: Sequence[str]) -> str:
    """The last part of a full key, where it tells it from the others."""
    leaf = key.rpartition(".")[2]
    return key if [other.rpartition(".")[2] for other in keys].count(leaf) > 1 else leaf


def _short_count(count: int | None) -> str:
    """Three digits, with k, M or G for thousands, millions or billions."""
    if count is None:
        return ""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def _cell(row: Row) -> str:
    return f"{row['bits_per_byte']:.4f}{'*' if row['extrapolation'] else ''}\n{row['perplexity']:.2f}"


def _any_extrapolation(results: Sequence[LengthResult]) -> bool:
    return any(row["extrapolation"] for result in results for row in result["rows"])


def _settings_table(first: Run, second: Run) -> "Table":
    from rich.table import Table

    keys = differing_settings([first, second])
    table = Table(title="settings that differ", title_justify="left")
    folders = [shlex.quote(str(run.folder)) for run in (first, second)]
    add_columns(table, ["setting", *folders], left=3)
    for key in keys:
        values = (setting_text(run.settings.get(key, ABSENT)) for run in (first, second))
        table.add_row(*map(as_text, (key, *values)))
    if not keys:
        table.add_row("(none)", "", "")
    return table


def _paired_table(pairs: Sequence[PairedLength], cluster: str) -> "Table":
    from rich.table import Table

    count = pairs[0].difference["pairs"]
    legend = (
        f"first, second: of all targets together. difference: bits per byte of {ARTICLES[cluster]} in the "
        f"second run minus those in the first, the mean of {count:,} {cluster}s, each counted once, with its "
        f"95% t interval, over {cluster}s and not over training seeds. equal: whether two one-sided tests, "
        f"with Holm's p over these lengths, show a difference below {MARGIN} bits per byte; no is no proof "
        "of a difference."
    )
    if any(pair.extrapolation for pair in pairs):
        legend += " * windows of 2c are longer than training sequences."
    table = Table(title="bits per byte", caption=legend, title_justify="left", caption_justify="left")
    add_columns(table, ["context c", "first", "second", "difference ± 95%", "equal"])
    tested = [pair.equivalence.p for pair in pairs if pair.equivalence is not None]
    adjusted = iter(holm(tested))
    for pair in pairs:
        table.add_row(
            f"{pair.context_length:,}{'*' if pair.extrapolation else ''}",
            f"{pair.first:.4f}",
            f"{pair.second:.4f}",
            interval_text(pair.difference),
            "" if pair.equivalence is None else "yes" if next(adjusted) <= LEVEL else "no",
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
