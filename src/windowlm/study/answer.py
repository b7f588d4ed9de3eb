"""The answer of a length study from the folders of its runs: main table, sentences and plots."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from windowlm.errors import UserError
from windowlm.evaluation.comparison import Run, runs_in
from windowlm.evaluation.equivalence import MARGIN
from windowlm.evaluation.paired_difference import paired_difference
from windowlm.evaluation.report import COLORS, png
from windowlm.evaluation.result import trained_context
from windowlm.json_text import parse_json
from windowlm.study.author_values import ALL_FAR, FAR_REPEATS, LOSS, RIGHT, SAVED, Figure, author_values
from windowlm.study.cell_names import cell_names, window_name
from windowlm.study.comparison_page import run_costs
from windowlm.study.setting_comparison import SettingClaim, compare_settings, evaluated_cells

GATE = ((4096, 2.0), (7000, 1.0))  # bytes back, nats a byte that full attention must save on random spans
USUAL = "full, base 10,000"
NAIVE_FROM = 512  # context length from which the naive gain is told, where it was scored


@dataclass(frozen=True)
class Cell:
    """Runs of one setting.

    Attributes:
        name: for readers.
        window: ``full``, ``window 512``, ``hybrid 128``.
        tokenizer: identity of the tokenizer; cells are compared where it is the same.
        runs: one a seed.
        authors: of each run, the figures of each author.
        means: of each figure, over authors and seeds.
        rows: of the first run's evaluation, with the bits per byte, naive ones too, averaged over seeds.
        costs: parameters, KV cache, FLOPs, and tokens a second in training, where known.
    """

    name: str
    window: str
    tokenizer: str
    runs: Sequence[Run]
    authors: Sequence[Mapping[Figure, Mapping[str, float]]]
    means: Mapping[Figure, float]
    rows: Sequence[Mapping[str, Any]]
    costs: Mapping[str, float | None]

    def mean(self, measure: str, group: str, context: int | None = None) -> float | None:
        """Of a figure, at a context length where it has several; None where it was not measured."""
        return next(
            (
                value
                for figure, value in self.means.items()
                if figure.is_called(measure, group) and context in (None, figure.context)
            ),
            None,
        )

    @cached_property
    def trained(self) -> Mapping[str, Any]:
        """Row of the ``trained_context``."""
        return _rows_within_training(self)[0]

    def row_at(self, context_length: int | None) -> Mapping[str, Any] | None:
        """Row of a context length."""
        return next((row for row in self.rows if row["context_length"] == context_length), None)


@dataclass(frozen=True)
class Answer:
    """What a study found.

    Attributes:
        base: the cell that all others of its tokenizer are compared with.
        cells: all, by tokenizer, in each the one first that the others are compared with.
        claims: each other cell against that one.
        sentences: the answer, by question.
    """

    base: str
    cells: Sequence[Cell]
    claims: Sequence[SettingClaim]
    sentences: Mapping[str, Sequence[str]]


def answer_of(folder: Path, evaluation: str, base: str | None = None) -> Answer:
    """Read the runs of a study.

    Args:
        folder: of the runs, also in folders below.
        evaluation: which of their evaluations.
        base: name of the cell to compare with; None for full attention at its best: of the cells of the
            most seeds the one with the least loss at the longest context within its training. What is
            scored here then chooses: name the one that validation chose. Cells of another tokenizer than
            its are compared with full attention among them.

    Raises:
        UserError: no full attention among the cells, or runs that cannot be compared.
    """
    found = evaluated_cells(runs_in(folder, evaluation))
    names = cell_names({label: runs[0].settings for label, runs in found.items()})
    cells = [_cell(names[label], runs) for label, runs in found.items()]
    listed = "; ".join(cell.name for cell in cells)
    if base is not None and base not in {cell.name for cell in cells}:
        raise UserError(f"--base {base}: there is no such cell; there are: {listed}")
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.tokenizer, []).append(cell)
    bases = {tokenizer: _best_full(group) for tokenizer, group in groups.items()}
    if base is None:
        with_full = [tokenizer for tokenizer, name in bases.items() if name is not None]
        if not with_full:
            raise UserError(
                f"{folder}: no cell has full attention ({listed}); give one to compare with: --base"
            )
        own = max(with_full, key=lambda tokenizer: len(groups[tokenizer]))
    else:
        own = next(cell.tokenizer for cell in cells if cell.name == base)
        bases[own] = base
    claims: list[SettingClaim] = []
    for tokenizer, group in groups.items():
        if (first := bases[tokenizer]) is not None:
            group.insert(0, group.pop([cell.name for cell in group].index(first)))
            claims += compare_settings({cell.name: cell.runs for cell in group}, first)
    others = [group for tokenizer, group in groups.items() if tokenizer != own]
    ordered = [*groups[own], *(cell for group in others for cell in group)]
    sentences = _sentences(groups[own], claims) | _other_tokenizers(groups[own][0], others, claims)
    return Answer(ordered[0].name, ordered, claims, sentences)


def _best_full(cells: Sequence[Cell]) -> str | None:
    """Full attention at its best: of the cells of the most seeds the one with the least loss."""
    full = [cell for cell in cells if cell.window == "full"]
    if not full:
        return None
    most = max(len(cell.runs) for cell in full)
    rivals = [cell for cell in full if len(cell.runs) == most]
    losses = [row["bits_per_byte"] for row in _rows_within_training(*rivals)]
    return rivals[losses.index(min(losses))].name


def _rows_within_training(*cells: Cell) -> list[Mapping[str, Any]]:
    """A row of each cell, at the longest context length that is beyond the training of none."""
    c = trained_context([run.result for cell in cells for run in cell.runs if run.result is not None])
    found = [row for cell in cells if (row := cell.row_at(c)) is not None]
    assert len(found) == len(cells), "the longest context belongs to the targets, which all share"
    return found


def main_rows(answer: Answer) -> list[dict[str, Any]]:
    """The study's main table: a row a cell."""
    base = answer.cells[0]
    lengths = [row["context_length"] for row in base.rows]
    shown = [c for c in (512, 4096, 16_384) if c in lengths] or lengths[-2:]
    rows = []
    for cell in answer.cells:
        row: dict[str, Any] = {"cell": cell.name, "seeds": len(cell.runs), **cell.costs}
        first = next(other for other in answer.cells if other.tokenizer == cell.tokenizer)
        if first is not base:
            row["against"] = first.name
        for c in shown:
            group = f"c = {c:,}"
            row[f"bits_per_byte_{c}"] = cell.mean(LOSS, group)
            row |= _against_base(answer.claims, cell, LOSS, group, f"difference_{c}")
        claim = _claim(answer.claims, cell, FAR_REPEATS, ALL_FAR)
        far = cell.trained["context_length"] if claim is None else claim.figure.context
        row["far_repeats_context"] = far
        row["far_repeats_nats_per_byte"] = cell.mean(FAR_REPEATS, ALL_FAR, far)
        row |= _against_base(answer.claims, cell, FAR_REPEATS, ALL_FAR, "far_repeats_difference")
        for figure in sorted(cell.means):
            if figure.measure.endswith(SAVED):
                kind = figure.measure.split()[0]
                row[f"saved_{kind}_{figure.order}"] = cell.means[figure]
            if figure.measure == RIGHT:
                row[f"right_of_ten_{figure.order}"] = cell.means[figure]
        rows.append(row)
    return rows


def plots(answer: Answer) -> dict[str, bytes]:
    """PNG files by name."""
    import altair as alt

    order = [cell.name for cell in answer.cells]
    color = alt.Color(
        "cell:N",
        sort=order,
        title=None,
        scale=alt.Scale(domain=order, scheme="tableau20"),
        legend=alt.Legend(labelLimit=400, columns=2),
    )

    def lines(values: list[dict[str, Any]], x: str, y: str) -> Any:
        base = alt.Chart(alt.Data(values=values)).encode(
            alt.X(
                "x:Q",
                title=x,
                scale=alt.Scale(type="log", base=2, nice=False, padding=12),
                axis=alt.Axis(
                    values=sorted({value["x"] for value in values}), format=",d", labelOverlap=True
                ),
            ),
            alt.Y("y:Q", title=y, scale=alt.Scale(zero=False, padding=8)),
            color,
        )
        return (base.mark_line() + base.mark_point(filled=True, size=35, opacity=1)).properties(
            width=420, height=280
        )

    made: dict[str, Any] = {
        "loss_by_context.png": lines(
            [
                {"cell": cell.name, "x": row["context_length"], "y": row["bits_per_byte"]}
                for cell in answer.cells
                for row in cell.rows
            ],
            "context c (tokens)",
            "bits per byte",
        )
    }
    for name, measure, title in (
        ("far_repeats.png", FAR_REPEATS, "nats a byte of far repeats, context within training"),
        ("pasted_random.png", f"random {SAVED}", "nats a byte saved, random spans"),
        ("pasted_natural.png", f"natural {SAVED}", "nats a byte saved, natural text"),
        ("forced_choice.png", RIGHT, "share right of ten"),
    ):
        values = [
            {"cell": cell.name, "x": figure.order, "y": value}
            for cell in answer.cells
            for figure, value in cell.means.items()
            if figure.measure == measure and figure.order > 0
            if figure.context in (None, cell.trained["context_length"])
        ]
        if values:
            made[name] = lines(values, "bytes back", title)
    costly = [cell for cell in answer.cells if cell.costs.get("kv_cache_bytes")]
    if costly:
        points = [
            {
                "cell": cell.name,
                "x": cell.costs["kv_cache_bytes"],
                "y": cell.trained["bits_per_byte"],
            }
            for cell in costly
        ]
        base = alt.Chart(alt.Data(values=points)).encode(
            alt.X(
                "x:Q",
                title="KV cache at the training length (bytes, bfloat16)",
                scale=alt.Scale(type="log", nice=False, padding=16),
                axis=alt.Axis(format=".2~s", labelOverlap=True),
            ),
            alt.Y("y:Q", title="bits per byte within training", scale=alt.Scale(zero=False, padding=12)),
        )
        named = base.mark_text(align="center", dy=-10, fontSize=10).encode(text="cell:N")
        made["loss_by_cache.png"] = (
            base.mark_point(filled=True, size=60, opacity=1, color=COLORS[0]) + named
        ).properties(width=420, height=280)
    return {name: png(chart) for name, chart in made.items()}


def _cell(name: str, runs: Sequence[Run]) -> Cell:
    values = [author_values(run).values for run in runs]
    shared = set.intersection(*(set(own) for own in values))
    results = [run.result for run in runs if run.result is not None]
    rows_at = [{row["context_length"]: row for row in result["rows"]} for result in results]
    rows: list[dict[str, Any]] = [
        {
            **row,
            "bits_per_byte": float(np.mean([own[c]["bits_per_byte"] for own in rows_at])),
            "naive_bits_per_byte": float(np.mean([own[c]["naive_bits_per_byte"] for own in rows_at])),
        }
        for c, row in rows_at[0].items()
        if all(c in own for own in rows_at)
    ]
    paces = [pace for run in runs if (pace := _pace(run.folder)) is not None]
    return Cell(
        name=name,
        window=window_name(runs[0].settings),
        tokenizer=results[0]["tokenizer_identity"],
        runs=runs,
        authors=values,
        means={
            figure: float(np.mean([np.mean(list(own[figure].values())) for own in values]))
            for figure in sorted(shared)
        },
        rows=rows,
        costs={
            "parameters": results[0]["parameters"],
            **run_costs(runs[0].folder, results[0]),
            "tokens_per_second": float(np.mean(paces)) if paces else None,
        },
    )


def _pace(folder: Path) -> float | None:
    """Tokens a second over the whole training."""
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        logged = [row for line in lines if "seconds" in (row := parse_json(line))]
        return float(logged[-1]["tokens"] / logged[-1]["seconds"])
    except (OSError, ValueError, KeyError, IndexError, TypeError, ZeroDivisionError):
        return None


def _claim(claims: Sequence[SettingClaim], cell: Cell, measure: str, group: str) -> SettingClaim | None:
    return next((c for c in claims if c.setting == cell.name and c.figure.is_called(measure, group)), None)


def _against_base(
    claims: Sequence[SettingClaim], cell: Cell, measure: str, group: str, name: str
) -> dict[str, Any]:
    claim = _claim(claims, cell, measure, group)
    if claim is None:
        return {}
    found = {name: claim.difference, f"{name}_low": claim.low, f"{name}_high": claim.high}
    return found | ({} if claim.equal is None else {f"{name}_equal": claim.equal})


def _sentences(cells: Sequence[Cell], claims: Sequence[SettingClaim]) -> dict[str, list[str]]:
    return {
        "Is the rival at its best?": _gate(cells),
        "Which windows are equal to full attention, and what do they lose?": _equal(cells, claims),
        "And of texts four times as long?": _longer(cells),
        "How much of the quarrel is the rotary base?": _rotary(cells, claims),
        "What does a hybrid win back?": _hybrid(cells, claims),
        "What do key-value heads cost?": _heads(cells),
        "How do speed and memory move?": _cost(cells),
        "Does the loss rise beyond the training length?": _beyond(cells),
        "How much of the naive gain is an artefact?": _naive(cells),
    }


def _other_tokenizers(
    base: Cell, groups: Sequence[Sequence[Cell]], claims: Sequence[SettingClaim]
) -> dict[str, list[str]]:
    """Whether the same is found with other tokenizers, each by itself, and how both compare by bytes."""
    found = []
    for group in groups:
        first = group[0]
        per_token = first.rows[0]["bytes"] / first.rows[0]["targets"]
        found.append(f"Of {first.name} a token has {per_token:.2f} bytes.")
        found += _equal(group, claims)
        found.append(_beside(first, base))
    return {"Does it hold with other tokens?": found} if found else {}


def _beside(cell: Cell, base: Cell) -> str:
    """Bits per byte of cells with different tokenizers, at the longest context that each was trained for."""
    here, there = cell.trained, base.trained
    said = (
        f"{cell.name}: {here['bits_per_byte']:.4f} bits per byte at c = {here['context_length']:,} of its "
        f"tokens, {base.name}: {there['bits_per_byte']:.4f} at {there['context_length']:,}"
    )
    one, two = cell.runs[0].result, base.runs[0].result
    assert one is not None
    assert two is not None
    if one.get("targets_within") != two["targets_hash"]:
        return f"{said}, which are of different text."
    of_cell, of_base = _by_author(cell, here["context_length"]), _by_author(base, there["context_length"])
    both = of_cell.keys() & of_base.keys()
    paired = paired_difference([of_base[name] for name in both], [of_cell[name] for name in both])
    interval = "" if paired.low is None else f" [{paired.low:+.4f}, {paired.high:+.4f}]"
    return (
        f"{said}; over authors {paired.mean:+.4f}{interval}. {here['bytes'] / there['bytes']:.3%} of the "
        "bytes are the same: tokens that cross an end of the targets are left out."
    )


def _by_author(cell: Cell, context_length: int) -> dict[str, float]:
    """Bits per byte, means over seeds."""
    figure = Figure(LOSS, context_length, f"c = {context_length:,}", context_length)
    each = [own[figure] for own in cell.authors]
    return {author: float(np.mean([own[author] for own in each])) for author in each[0]}


def _gate(cells: Sequence[Cell]) -> list[str]:
    """What each cell with full attention saves, the base first."""
    found = []
    for cell in cells:
        for distance, least in GATE:
            saved = cell.mean(f"random {SAVED}", f"{distance:,} bytes back")
            if cell.window == "full" and saved is not None:
                verdict = "met" if saved >= least else "missed"
                found.append(
                    f"{cell.name} saves {saved:.3f} nats a byte on random spans {distance:,} bytes back; the "
                    f"gate, {least:g}, is {verdict}."
                )
    return found or ["The gate was not measured: no random spans at its distances."]


def _longer(cells: Sequence[Cell]) -> list[str]:
    """Cells trained further on longer sequences, beside full attention at its best there."""
    longer = [cell for cell in cells if _trained_length(cell) > _trained_length(cells[0])]
    if not longer:
        return ["Not measured: no cell was trained on longer sequences."]
    c = max(longer, key=_trained_length).trained["context_length"]
    rivals = [cell for cell in cells if cell.window == "full" and _loss_at(cell, c) is not None]
    if not rivals:
        return [f"Not measured: no full attention at c = {c:,}."]
    rivals.sort(key=lambda cell: _loss_at(cell, c) or 0.0)
    best = rivals[0]
    found = [
        f"Full attention at c = {c:,} in bits per byte: "
        + "; ".join(f"{cell.name} {_loss_at(cell, c):.4f}" for cell in rivals)
        + f". The best, {best.name}, is what the others are compared with."
    ]
    others = [cell for cell in longer if cell.window != "full" and _loss_at(cell, c) is not None]
    claims = compare_settings({cell.name: cell.runs for cell in (best, *others)}, best.name, c)
    return found + _equal([best, *others], claims, c)


def _trained_length(cell: Cell) -> int:
    result = cell.runs[0].result
    assert result is not None
    return result["training_length"]


def _loss_at(cell: Cell, c: int) -> float | None:
    row = cell.row_at(c)
    return None if row is None else row["bits_per_byte"]


def _equal(cells: Sequence[Cell], claims: Sequence[SettingClaim], c: int | None = None) -> list[str]:
    found = []
    for cell in cells[1:]:
        at = _rows_within_training(cells[0], cell)[0]["context_length"] if c is None else c
        claim = _claim(claims, cell, LOSS, f"c = {at:,}")
        if claim is None:
            continue
        verdict = "is not shown to be equal"
        if claim.equal:
            verdict = f"is equal to {cells[0].name} within {MARGIN}"
        sentence = f"{cell.name}: {_change(claim)} bits per byte at c = {at:,}, and {verdict}"
        far = _claim(claims, cell, FAR_REPEATS, ALL_FAR)
        if far is not None:
            sentence += f"; on far repeats {_change(far)} nats a byte"
            if far.figure.context != at:
                sentence += f" at c = {far.figure.context:,}"
        found.append(f"{sentence} ({claim.over}).")
    return found


def _change(claim: SettingClaim) -> str:
    interval = "" if claim.low is None else f" [{claim.low:+.4f}, {claim.high:+.4f}]"
    return f"{claim.difference:+.4f}{interval}"


def _far_loss(cell: Cell, claims: Sequence[SettingClaim]) -> float | None:
    """What a cell loses on far repeats against the base; None where that is not more than chance.

    A share of a loss that may be none would be a share of noise.
    """
    claim = _claim(claims, cell, FAR_REPEATS, ALL_FAR)
    return None if claim is None or claim.low is None or claim.low <= 0 else claim.difference


def _rotary(cells: Sequence[Cell], claims: Sequence[SettingClaim]) -> list[str]:
    usual = next((cell for cell in cells[1:] if cell.name == USUAL), None)
    poor = None if usual is None else _claim(claims, usual, FAR_REPEATS, ALL_FAR)
    if poor is None:
        return [f"Not measured: no cell {USUAL} beside another base, with far repeats."]
    found = [f"{USUAL} loses {_change(poor)} nats a byte on far repeats against {cells[0].name}."]
    for cell in cells:
        lost = _far_loss(cell, claims)
        if cell.window.startswith("window ") and lost is not None:
            found.append(f"That is {poor.difference / lost:.0%} of what {cell.name} loses, {lost:+.4f}.")
    return found


def _hybrid(cells: Sequence[Cell], claims: Sequence[SettingClaim]) -> list[str]:
    best, found = cells[0], []
    for cell in cells:
        size = cell.window.removeprefix("hybrid ")
        plain = next((other for other in cells if other.name == f"window {size}"), None)
        here = _claim(claims, cell, FAR_REPEATS, ALL_FAR)
        if not cell.window.startswith("hybrid ") or plain is None or here is None:
            continue
        lost = _far_loss(plain, claims)
        if lost is None:
            found.append(
                f"{plain.name} loses nothing certain on far repeats that {cell.name} could win back."
            )
            continue
        sentence = (
            f"{cell.name} wins back {1 - here.difference / lost:.0%} of what {plain.name} loses on far "
        )
        sentence += f"repeats against {best.name}"
        cache, whole = cell.costs.get("kv_cache_bytes"), best.costs.get("kv_cache_bytes")
        if cache and whole:
            sentence += f", with {cache / whole:.1%} of its KV cache"
        found.append(f"{sentence}.")
    return found or ["Not measured: no hybrid beside a window of its size, with far repeats."]


def _heads(cells: Sequence[Cell]) -> list[str]:
    found = []
    for cell in cells:
        plain = next((other for other in cells if other.name == cell.window), None)
        if "KV heads" not in cell.name or plain is None:
            continue
        here, there = _rows_within_training(cell, plain)
        found.append(
            f"{cell.name}: {here['bits_per_byte'] - there['bits_per_byte']:+.4f} bits per byte against "
            f"{plain.name} at c = {here['context_length']:,}, {cell.costs['parameters']:,} and "
            f"{plain.costs['parameters']:,} parameters."
        )
    return found or ["Not measured: no cells with other numbers of key-value heads."]


def _cost(cells: Sequence[Cell]) -> list[str]:
    best, found = cells[0], []
    for cell in cells:
        parts = []
        for key, unit in (("tokens_per_second", "tokens a second"), ("kv_cache_bytes", "bytes of KV cache")):
            own, whole = cell.costs.get(key), best.costs.get(key)
            if own and whole:
                parts.append(f"{own:,.0f} {unit} ({own / whole:.2f} of {best.name})")
        if parts:
            found.append(f"{cell.name}: {'; '.join(parts)}.")
    return found or ["Not measured: no run says its pace or its shape."]


def _certain_difference(one: Cell, other: Cell, context_length: int) -> float:
    """Other minus one in bits per byte over authors; 0 where the interval holds it."""
    here, there = _by_author(one, context_length), _by_author(other, context_length)
    both = [author for author in here if author in there]
    paired = paired_difference([here[author] for author in both], [there[author] for author in both])
    certain = paired.low is not None and paired.high is not None and paired.low * paired.high > 0
    return paired.mean if certain else 0.0


def _beyond(cells: Sequence[Cell]) -> list[str]:
    found = []
    for cell in cells:
        within = [row for row in cell.rows if not row["extrapolation"]]
        beyond = [row for row in cell.rows if row["extrapolation"]]
        if within and beyond:
            change = beyond[-1]["bits_per_byte"] - within[-1]["bits_per_byte"]
            found.append(
                f"{cell.name}: {change:+.4f} bits per byte from c = {within[-1]['context_length']:,} to "
                f"{beyond[-1]['context_length']:,}, beyond the training length."
            )
    return found or ["Not measured: no context beyond the training length."]


def _naive(cells: Sequence[Cell]) -> list[str]:
    """Gains within the training, as beyond it the model itself gets worse."""
    found = []
    for cell in cells:
        last = cell.trained
        first = (cell.row_at(NAIVE_FROM) if last["context_length"] > NAIVE_FROM else None) or cell.rows[0]
        honest = first["bits_per_byte"] - last["bits_per_byte"]
        naive = first["naive_bits_per_byte"] - last["naive_bits_per_byte"]
        if naive > 0:
            found.append(
                f"{cell.name}: from c = {first['context_length']:,} to {last['context_length']:,} the naive "
                f"figure falls by {naive:.4f}, the honest one by {honest:.4f}: {1 - honest / naive:.0%} of "
                "the gain is an artefact."
            )
    turned = []
    for one, other in combinations(cells, 2):
        for here in one.rows:
            there = other.row_at(here["context_length"])
            if there is None or here["extrapolation"] or there["extrapolation"]:
                continue
            honest = there["bits_per_byte"] - here["bits_per_byte"]
            naive = there["naive_bits_per_byte"] - here["naive_bits_per_byte"]
            # Over authors each counts the same, in the naive figure each byte.
            certain = _certain_difference(one, other, here["context_length"])
            if certain * honest > 0 > certain * naive:
                turned.append(f"{one.name} and {other.name} at c = {here['context_length']:,}")
    listed = "; ".join(turned)
    found.append(
        f"The naive figure turns these rankings round: {listed}."
        if turned
        else "It turns no ranking round of which the honest figure's interval over authors is certain."
    )
    return found
