"""One self-contained page of sentences, plots with hover values, and tables; it needs no network."""

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from windowlm.evaluation.vega_bundle import vega_bundle

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0 auto;
  max-width: 62rem; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-top: 1px solid #ddd;
  padding-top: 1rem; }
.plots { display: flex; flex-wrap: wrap; gap: 1.5rem; } .plot { flex: 1 1 20rem; min-width: 0; }
.plot .chart { width: 100%; }
.table { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; margin: 1rem 0; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #eee; white-space: nowrap; }
th { border-bottom: 1px solid #888; vertical-align: bottom; }
th.text, td.text { text-align: left; }
td.text { white-space: normal; min-width: 7rem; max-width: 40rem; overflow-wrap: anywhere; }
summary { cursor: pointer; }
@media print { body { max-width: none; font-size: 11px; } h2, .plot { break-inside: avoid; }
  .table { overflow: visible; } }
"""
SCRIPT = """
for (const [id, spec] of Object.entries(JSON.parse(document.getElementById("charts").textContent)))
  vegaEmbed("#" + id, spec, {renderer: "svg", actions: false});
"""


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: its heading.
        sentences: paragraphs below it.
        charts: Altair charts.
        rows: a table, one flat object a row.
        folded: the table is shown on a click.
    """

    title: str
    sentences: Sequence[str] = ()
    charts: Sequence[Any] = ()
    rows: Sequence[Mapping[str, Any]] = ()
    folded: bool = False


@dataclass
class _Specifications:
    by_id: dict[str, Any] = field(default_factory=dict)

    def add(self, chart: Any) -> str:
        name = f"chart-{len(self.by_id) + 1}"
        styled = chart.properties(width="container", height=260)
        styled = styled.configure_legend(orient="bottom", labelLimit=400, columns=1).configure_view(
            stroke="#ccc"
        )
        specification = styled.to_dict()
        # Only names the version; a page that works without a network holds no address.
        specification.pop("$schema", None)
        self.by_id[name] = specification
        return name


def html_page(title: str, sections: Sequence[Section]) -> bytes:
    """The page as UTF-8."""
    specifications = _Specifications()
    body = "".join(_section(section, specifications) for section in sections)
    charts = json.dumps(specifications.by_id).replace("<", "\\u003c")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n"
        # Vega's bundle is a module of its own scope.
        f'<script type="module">{vega_bundle()}\n{SCRIPT}</script>\n</head>\n<body>\n'
        f"<h1>{html.escape(title)}</h1>\n{body}"
        f'<script type="application/json" id="charts">{charts}</script>\n</body>\n</html>\n'
    ).encode()


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """HTML of a table; columns that hold text stand to the left."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    texts = {name for name in columns if any(isinstance(row.get(name), str | list | dict) for row in rows)}

    def cell(kind: str, name: str, text: str) -> str:
        marked = ' class="text"' if name in texts else ""
        return f"<{kind}{marked}>{html.escape(text)}</{kind}>"

    head = "".join(cell("th", name, name.replace("_", " ")) for name in columns)
    lines = "".join(
        f"<tr>{''.join(cell('td', name, shown(row.get(name))) for name in columns)}</tr>\n" for row in rows
    )
    return f'<div class="table"><table>\n<tr>{head}</tr>\n{lines}</table></div>\n'


def shown(value: Any) -> str:
    """A value as a reader wants it: whole numbers in groups of three, others with four digits or more."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return (
            f"{value:,.0f}"
            if abs(value) >= 10_000
            else f"{value:.4g}"
            if abs(value) < 0.1
            else f"{value:.4f}"
        )
    return str(value)


def _section(section: Section, specifications: _Specifications) -> str:
    parts = [f"<section>\n<h2>{html.escape(section.title)}</h2>\n"]
    parts += [f"<p>{html.escape(sentence)}</p>\n" for sentence in section.sentences]
    if section.charts:
        plots = "".join(
            f'<div class="plot"><div class="chart" id="{specifications.add(chart)}"></div></div>\n'
            for chart in section.charts
        )
        parts.append(f'<div class="plots">\n{plots}</div>\n')
    if section.rows:
        content = table(section.rows)
        parts.append(
            f"<details><summary>{len(section.rows):,} rows</summary>\n{content}</details>\n"
            if section.folded
            else content
        )
    return "".join([*parts, "</section>\n"])
