"""The result for readers: a table for the terminal and a plot for a paper."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from windowlm.evaluation.result import Interval, LengthResult

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

PIXELS_PER_INCH = 216
NOT_IN_XML = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
COLORS = [
    "#1b5e9b",
    "#b3541e",
    "#3a7d34",
    "#7a4fa3",
    "#8a6d00",
    "#5a5a5a",
    "#c2417c",
    "#008b8b",
    "#9c3d3d",
    "#4b6a88",
]
ARTICLES = {"author": "an author", "document": "a document"}
PROTOCOL, NAIVE = "same targets, growing context", "naive: windows of c tokens"


def length_table(result: LengthResult) -> "Table":
    """Perplexity and bits per byte at each context length, and the change from the shortest."""
    from rich.table import Table

    rows = result["rows"]
    pairs = len(result["documents"])
    table = Table(
        title=f"{rows[0]['targets']:,} targets ({rows[0]['bytes']:,} bytes) of {pairs:,} documents, "
        f"{result['split']}, {result['precision']}",
        caption=caption(result),
        title_justify="left",
        caption_justify="left",
    )
    add_columns(table, ["context c", "perplexity", "bits/byte", "change ± 95%", "naive bits/byte"])
    for row in rows:
        table.add_row(
            f"{row['context_length']:,}{'*' if row['extrapolation'] else ''}",
            f"{row['perplexity']:.3f}",
            f"{row['bits_per_byte']:.4f}",
            interval_text(row["change_from_shortest"]),
            f"{row['naive_bits_per_byte']:.4f}",
        )
    return table


def add_columns(table: "Table", headings: Sequence[str], left: int = 0) -> None:
    """Columns with these headings; the first ``left`` hold text, the others numbers."""
    for position, heading in enumerate(headings):
        table.add_column(
            as_text(heading),
            justify="left" if position < left else "right",
            overflow="fold",
            no_wrap=position >= left,
        )


def as_text(text: str) -> "Text":
    """Text to the letter: names from outside may look like rich's markup."""
    from rich.text import Text

    return Text(text)


def caption(result: LengthResult) -> str:
    """What the numbers are, in a sentence or three."""
    cluster = result["cluster"]
    sentences = [
        f"context c: every target sees c to 2c - 1 tokens. change: bits per byte of {ARTICLES[cluster]} "
        f"minus those at the shortest c, the mean of the {cluster}s, each counted once, with its 95% t "
        "interval. naive: the same targets in windows of c tokens that do not overlap, so that a target sees "
        "1 to c."
    ]
    whole = result["paired"]
    low, high = (None, None) if whole is None else (whole["low"], whole["high"])
    if whole is not None and low is not None and high is not None and low <= 0 <= high:
        sentences.append(
            f"Whether c = {whole['longest']} differs from c = {whole['shortest']} cannot be told: "
            "the interval of the change holds zero."
        )
    if any(row["extrapolation"] for row in result["rows"]):
        sentences.append(f"* windows of 2c beyond the {result['training_length']:,} tokens of training.")
    if result["documents_too_short"]:
        sentences.append(
            f"{result['documents_too_short']:,} documents are too short and left out at every c."
        )
    if result["authors_too_short"]:
        sentences.append(
            f"{result['authors_too_short']:,} authors lack evaluation.bytes_per_author and are left out."
        )
    if result["documents_over_budget"]:
        budget = "max_targets" if result["bytes_per_author"] is None else "bytes_per_author"
        sentences.append(f"{result['documents_over_budget']:,} documents are beyond evaluation.{budget}.")
    return " ".join(sentences)


def interval_text(change: Interval | None) -> str:
    """``-0.1234 ± 0.0066``, the half width of the interval, which one document does not have."""
    if change is None:
        return ""
    if change["high"] is None:
        return f"{change['mean']:+.4f}"
    return f"{change['mean']:+.4f} ± {change['high'] - change['mean']:.4f}"


def length_plot(result: LengthResult) -> bytes:
    """PNG: bits per byte by context length, and the paired change from the shortest with its interval."""
    import altair as alt

    rows = result["rows"]
    panels = [levels_chart(result).properties(width=300, height=220)]
    changes = change_chart(result)
    if changes is not None:
        panels.append(changes.properties(width=220, height=220))
    counts = f"{len(result['documents']):,} documents, {rows[0]['targets']:,} targets each length"
    subtitle = f"{counts}; {window_text(result)}"
    if any(row["extrapolation"] for row in rows):
        subtitle += f"; hollow: beyond the {result['training_length']:,} tokens of training"
    chart = alt.hconcat(*panels, title=alt.Title("Loss by context length", subtitle=subtitle, anchor="start"))
    return png(chart)


def levels_chart(result: LengthResult) -> Any:
    """Bits per byte by context length, of the protocol and naive, with hover values."""
    import altair as alt

    rows = result["rows"]
    levels = [
        {"c": row["context_length"], "bits": bits, "series": series, "extrapolation": row["extrapolation"]}
        for row in rows
        for bits, series in ((row["bits_per_byte"], PROTOCOL), (row["naive_bits_per_byte"], NAIVE))
    ]
    context = context_axis(alt, [row["context_length"] for row in rows])
    names = [PROTOCOL, NAIVE]
    legend = alt.Legend(symbolType="stroke", symbolSize=300, symbolStrokeWidth=2)
    color = alt.Color("series:N", title=None, scale=alt.Scale(domain=names, range=COLORS[:2]), legend=legend)
    dash = alt.StrokeDash(
        "series:N", title=None, scale=alt.Scale(domain=names, range=[[1, 0], [5, 3]]), legend=legend
    )
    bits = alt.Y("bits:Q", title="bits per byte", scale=alt.Scale(zero=False, padding=8))
    hover = [
        alt.Tooltip("series:N", title="of"),
        alt.Tooltip("c:Q", title="context c", format=",d"),
        alt.Tooltip("bits:Q", title="bits per byte", format=".5f"),
        alt.Tooltip("extrapolation:N", title="beyond training length"),
    ]
    base = alt.Chart(alt.Data(values=levels)).encode(context, bits, color, tooltip=hover)
    extrapolated = alt.FieldEqualPredicate(field="extrapolation", equal=True)
    fill = alt.condition(
        extrapolated,
        alt.value("white"),
        alt.Fill("series:N", scale=alt.Scale(domain=names, range=COLORS[:2]), legend=None),
    )
    return base.mark_line().encode(dash) + base.mark_point(size=45, opacity=1).encode(fill=fill)


def change_chart(result: LengthResult) -> Any | None:
    """Paired change from the shortest context with its interval and hover values; None with one length."""
    import altair as alt

    rows = result["rows"]
    changes = [
        {"c": row["context_length"], **row["change_from_shortest"]}
        for row in rows
        if row["change_from_shortest"]
    ]
    if not changes:
        return None
    axis = alt.Y("mean:Q", title=[f"change from context {rows[0]['context_length']:,}", "(bits per byte)"])
    hover = [
        alt.Tooltip("c:Q", title="context c", format=",d"),
        alt.Tooltip("mean:Q", title="change", format="+.5f"),
        alt.Tooltip("low:Q", title="95% from", format="+.5f"),
        alt.Tooltip("high:Q", title="to", format="+.5f"),
    ]
    context = context_axis(alt, [row["context_length"] for row in rows])
    change = alt.Chart(alt.Data(values=changes)).encode(context, axis, tooltip=hover)
    marks = change.mark_point(filled=True, size=45, opacity=1, color=COLORS[0])
    if changes[0]["low"] is not None:
        marks = (
            change.mark_rule(color=COLORS[0], strokeWidth=1.5).encode(alt.Y("low:Q"), alt.Y2("high:Q"))
            + marks
        )
    zero = alt.Chart(alt.Data(values=[{"zero": 0}])).mark_rule(color="#888").encode(alt.Y("zero:Q"))
    return zero + marks


def context_axis(alt: Any, lengths: list[int]) -> Any:
    """Logarithmic axis of context lengths with a tick at each of them."""
    return alt.X(
        "c:Q",
        title="context c (tokens; a target sees c to 2c - 1)",
        scale=alt.Scale(type="log", base=2, nice=False, padding=12),
        axis=alt.Axis(values=sorted(set(lengths)), format=",d", grid=False, labelOverlap=True),
    )


def png(chart: Any) -> bytes:
    """Render a chart at the resolution of print, without a browser."""
    import vl_convert

    styled = chart.configure_legend(orient="bottom", labelLimit=400).configure_view(stroke="#ccc")
    image: bytes = vl_convert.vegalite_to_png(_in_xml(styled.to_dict()), ppi=PIXELS_PER_INCH)
    return image


def _in_xml(value: Any) -> Any:
    """A specification whose texts hold U+FFFD for what XML cannot, at which the renderer ends the process."""
    if isinstance(value, str):
        return NOT_IN_XML.sub("\N{REPLACEMENT CHARACTER}", value)
    if isinstance(value, dict):
        return {_in_xml(name): _in_xml(entry) for name, entry in value.items()}
    return [_in_xml(entry) for entry in value] if isinstance(value, list | tuple) else value


def window_text(result: LengthResult) -> str:
    """Windows of the layers' pattern and the receptive field, in words."""
    window = result["window"]
    reach = result["receptive_field"]
    if isinstance(window, str):
        return window
    shown = " ".join(
        "full" if size is None else str(size) for size in (window if isinstance(window, list) else [window])
    )
    return f"window {shown}" + (f", receptive field {reach:,}" if reach is not None else "")
