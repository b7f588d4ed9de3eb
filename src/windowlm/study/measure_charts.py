"""Plots of the measures, with hover values and intervals."""

from collections.abc import Callable, Sequence
from typing import Any

from windowlm.evaluation.report import COLORS
from windowlm.study.measure_result import MeasureResult

TITLES = {
    "far_repeats": "Far repeats of rare words",
    "key_words": "Key words, chosen by other models",
    "pasted_spans": "Spans pasted a second time",
    "forced_choice": "Ten-way forced choice of a value by its key",
    "far_context": "Far context left out, shuffled, or another author's",
    "reach": "Measured reach",
    "useful_reach": "Useful reach",
}


def measure_charts(result: MeasureResult) -> list[Any]:
    """Charts of a measure, the one that says most first; none where there is nothing to plot."""
    make = _CHARTS.get(result["measure"])
    return make(result["rows"]) if make is not None and result["rows"] else []


def _by_context(name: str, title: str) -> Callable[[Sequence[dict[str, Any]]], list[Any]]:
    """Change and level of the loss by context length, a color for each group."""

    def charts(rows: Sequence[dict[str, Any]]) -> list[Any]:
        values = [{**row, name: _group(row, name)} for row in rows]
        color = _color(values, name, title)
        context = _context([row["context_length"] for row in rows])
        changes = [row for row in values if row["change"] is not None]
        level = _lines(values, context, _axis("nats_per_byte", "nats a byte", zero=False), color, name, title)
        if not changes:
            return [level]
        change = _lines(
            changes,
            context,
            _axis("change", ["change from the shortest", "context (nats a byte)"]),
            color,
            name,
            title,
            interval=("change_low", "change_high"),
        )
        return [change, level]

    return charts


def _pasted_spans(rows: Sequence[dict[str, Any]]) -> list[Any]:
    return [
        _lines(
            rows,
            _distance(rows),
            _axis("saved", "nats a byte saved"),
            _color(rows, "span", "span"),
            "span",
            "span",
            interval=("saved_low", "saved_high"),
        )
    ]


def _forced_choice(rows: Sequence[dict[str, Any]]) -> list[Any]:
    import altair as alt

    base = alt.Chart(alt.Data(values=list(rows))).encode(
        alt.X("distance:O", title="bytes from facts to question", axis=alt.Axis(format=",d", labelAngle=0)),
        alt.Y("depth:O", title="share before the facts"),
        tooltip=[
            alt.Tooltip("distance:Q", title="distance (bytes)", format=",d"),
            alt.Tooltip("depth:Q"),
            alt.Tooltip("right:Q", format=".1%"),
            alt.Tooltip("right_low:Q", title="95% from", format=".1%"),
            alt.Tooltip("right_high:Q", title="to", format=".1%"),
            alt.Tooltip("questions:Q", format=",d"),
        ],
    )
    scale = alt.Scale(domain=[rows[0]["chance"], 1.0], range=["#ffffff", "#08519c"], clamp=True)
    legend = alt.Legend(title="right; white: chance, 10%", format=".0%", gradientLength=160)
    cells = base.mark_rect(stroke="#ddd").encode(alt.Color("right:Q", scale=scale, legend=legend))
    light = alt.condition("datum.right > 0.6", alt.value("white"), alt.value("#222"))
    return [cells + base.mark_text().encode(alt.Text("right:Q", format=".0%"), color=light)]


def _far_context(rows: Sequence[dict[str, Any]]) -> list[Any]:
    import altair as alt

    values = [row for row in rows if row["difference"] is not None]
    base = alt.Chart(alt.Data(values=values)).encode(
        alt.Y("far_context:N", title=None, sort=None),
        tooltip=_hover("far_context", "far context", "difference", ("difference_low", "difference_high")),
    )
    axis = alt.X("difference:Q", title="bits per byte more than with the intact context")
    zero = alt.Chart(alt.Data(values=[{"zero": 0}])).mark_rule(color="#888").encode(alt.X("zero:Q"))
    marks = zero
    if values and values[0]["difference_low"] is not None:
        marks = marks + base.mark_rule(color=COLORS[0], strokeWidth=1.5).encode(
            alt.X("difference_low:Q"), alt.X2("difference_high:Q")
        )
    return [marks + base.mark_point(filled=True, size=60, opacity=1, color=COLORS[0]).encode(axis)]


_CHARTS: dict[str, Callable[[Sequence[dict[str, Any]]], list[Any]]] = {
    "far_repeats": _by_context("last_use", "last use (bytes back)"),
    "key_words": _by_context("chooser", "chosen by"),
    "pasted_spans": _pasted_spans,
    "forced_choice": _forced_choice,
    "far_context": _far_context,
}


def _group(row: dict[str, Any], name: str) -> str:
    if name != "last_use":
        return str(row[name])
    high = row["distance_to"]
    return f"from {row['distance_from']:,}" if high is None else f"{row['distance_from']:,} to {high:,}"


def _lines(
    rows: Sequence[dict[str, Any]],
    x: Any,
    y: Any,
    color: Any,
    name: str,
    title: str,
    interval: tuple[str, str] | None = None,
) -> Any:
    import altair as alt

    field = y.shorthand.removesuffix(":Q")
    hover = [
        alt.Tooltip(x.shorthand, title="at", format=",d"),
        *_hover(name, title, field, interval),
    ]
    base = alt.Chart(alt.Data(values=list(rows))).encode(x, y, color, tooltip=hover)
    marks = base.mark_line() + base.mark_point(filled=True, size=45, opacity=1)
    if interval is None:
        return marks
    low, high = interval
    stated = alt.Chart(alt.Data(values=[row for row in rows if row[low] is not None]))
    return stated.mark_rule(strokeWidth=1.2).encode(x, alt.Y(f"{low}:Q"), alt.Y2(f"{high}:Q"), color) + marks


def _hover(name: str, title: str, field: str, interval: tuple[str, str] | None) -> list[Any]:
    import altair as alt

    found = [alt.Tooltip(f"{name}:N", title=title), alt.Tooltip(f"{field}:Q", format=".5f")]
    if interval is not None:
        found += [
            alt.Tooltip(f"{end}:Q", title=said, format=".5f")
            for end, said in zip(interval, ("95% from", "to"), strict=True)
        ]
    return found


def _axis(field: str, title: str | list[str], *, zero: bool = True) -> Any:
    import altair as alt

    return alt.Y(f"{field}:Q", title=title, scale=alt.Scale(zero=zero, padding=8))


def _color(rows: Sequence[dict[str, Any]], name: str, title: str) -> Any:
    import altair as alt

    groups = list(dict.fromkeys(row[name] for row in rows))
    return alt.Color(f"{name}:N", title=title, scale=alt.Scale(domain=groups, range=COLORS), sort=None)


def _context(lengths: Sequence[int]) -> Any:
    return _logarithmic("context_length", "context c (tokens)", lengths)


def _distance(rows: Sequence[dict[str, Any]]) -> Any:
    return _logarithmic("distance", "distance (bytes)", [row["distance"] for row in rows])


def _logarithmic(field: str, title: str, values: Sequence[int]) -> Any:
    import altair as alt

    return alt.X(
        f"{field}:Q",
        title=title,
        scale=alt.Scale(type="log", base=2, nice=False, padding=12),
        axis=alt.Axis(values=sorted(set(values)), format=",d", grid=False, labelOverlap=True),
    )
