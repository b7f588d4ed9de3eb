"""A page over many runs: loss and far-repeat loss against what the models cost, the Pareto front marked."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from windowlm.atomic_write import write_atomically
from windowlm.evaluation.comparison import ABSENT, Run, differing_settings, runs_in
from windowlm.evaluation.html_page import Section, html_page
from windowlm.evaluation.report import COLORS
from windowlm.evaluation.result import LengthResult, trained_row
from windowlm.evaluation.result_files import OWN_EVALUATION
from windowlm.model.config import ModelConfig
from windowlm.model.cost import model_cost
from windowlm.setting_text import setting_text
from windowlm.study.measure_files import is_of, read_measure

BFLOAT16_BYTES = 2
COSTS = {
    "kv_cache_bytes": "KV cache at the training length (bytes, bfloat16)",
    "flops_per_token": "FLOPs a token, forward and backward",
}
LOSSES = {"perplexity": "perplexity", "far_repeat_nats": "nats a byte of far repeats"}


def write_comparison_page(folder: Path, evaluation: str = OWN_EVALUATION) -> Path:
    """Write ``comparison.html`` into a folder of runs, and return its path.

    Args:
        folder: where the runs are.
        evaluation: which of their evaluations; of another than their own the file is named after it.

    Raises:
        UserError: no run is there, or a file is damaged.
    """
    runs = [run for run in runs_in(folder, evaluation) if run.result is not None]
    keys = differing_settings(runs) if runs else []
    rows = [_row(folder, run, keys) for run in runs]
    charts = [
        _chart(rows, cost, loss)
        for loss in LOSSES
        for cost in COSTS
        if any(row[cost] is not None and row[loss] is not None for row in rows)
    ]
    sentences = [
        "Each point is a run, at its longest context within its training. The line joins the Pareto front, "
        "the runs beside which no other is at most as dear and better. Differences between points hold no "
        "interval: compare two runs for that.",
    ]
    hashes = {run.result["targets_hash"] for run in runs if run.result is not None}
    if len(hashes) > 1:
        sentences.append("The runs did not all score the same text: their points do not compare.")
    path = folder / f"comparison{evaluation.removeprefix(OWN_EVALUATION)}.html"
    section = Section("Loss against cost", sentences, charts, rows)
    write_atomically(path, html_page(f"Runs in {folder.name}", [section]))
    return path


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether no other point (cost, loss) is at most as large in both and smaller in one."""
    return [
        not any(other[0] <= point[0] and other[1] <= point[1] and other != point for other in points)
        for point in points
    ]


def _row(folder: Path, run: Run, keys: Sequence[str]) -> dict[str, Any]:
    assert run.result is not None
    row = trained_row(run.result)
    name = "." if run.folder == folder else str(run.folder.relative_to(folder))
    return {
        "run": name,
        **{key: setting_text(run.settings.get(key, ABSENT)) for key in keys},
        "context_length": row["context_length"],
        "perplexity": row["perplexity"],
        "bits_per_byte": row["bits_per_byte"],
        "far_repeat_nats": _far_repeat_nats(run, row["context_length"]),
        "parameters": run.result["parameters"],
        **run_costs(run.folder, run.result),
    }


def run_costs(folder: Path, result: LengthResult) -> dict[str, float | None]:
    """Costs by name, None where the run's settings do not tell them."""
    try:
        settings = json.loads((folder / "model" / "config.json").read_text(encoding="utf-8"))
        config = TypeAdapter(ModelConfig).validate_json(json.dumps(settings["model"]), strict=True)
        cost = model_cost(config, settings["vocabulary_size"], result["training_length"], BFLOAT16_BYTES)
    except (OSError, ValueError, ValidationError, KeyError, TypeError):
        return dict.fromkeys(COSTS)
    return {"kv_cache_bytes": cost.kv_cache_bytes, "flops_per_token": cost.flops_per_token}


def _far_repeat_nats(run: Run, context_length: int) -> float | None:
    """Nats a byte of all far repeats."""
    assert run.result is not None
    measured = read_measure(run.folder / run.evaluation, "far_repeats")
    if measured is None or not is_of(measured, run.result):
        return None
    rows = [row for row in measured["rows"] if row["context_length"] == context_length]
    size = float(sum(row["bytes"] for row in rows))
    return math.fsum(row["nats"] for row in rows) / size if size else None


def _chart(rows: Sequence[dict[str, Any]], cost: str, loss: str) -> Any:
    import altair as alt

    known = [row for row in rows if row[cost] is not None and row[loss] is not None]
    front = pareto_front([(row[cost], row[loss]) for row in known])
    # Keys with dots would be read as paths.
    points = [
        {
            "run": row["run"],
            "cost": row[cost],
            "loss": row[loss],
            "front": best,
            "context": row["context_length"],
        }
        for row, best in zip(known, front, strict=True)
    ]
    x = alt.X(
        "cost:Q",
        title=COSTS[cost],
        scale=alt.Scale(type="log", nice=False, padding=16),
        axis=alt.Axis(format=".2~s", labelOverlap=True),
    )
    y = alt.Y("loss:Q", title=LOSSES[loss], scale=alt.Scale(zero=False, padding=12))
    hover = [
        alt.Tooltip("run:N"),
        alt.Tooltip("cost:Q", title=COSTS[cost], format=",.4s"),
        alt.Tooltip("loss:Q", title=LOSSES[loss], format=".5f"),
        alt.Tooltip("context:Q", title="context c", format=",d"),
        alt.Tooltip("front:N", title="on the front"),
    ]
    line = alt.Chart(alt.Data(values=[point for point in points if point["front"]]))
    fill = alt.condition("datum.front", alt.value(COLORS[0]), alt.value("white"))
    base = alt.Chart(alt.Data(values=points)).encode(x, y, tooltip=hover)
    marks = base.mark_point(size=70, opacity=1, color=COLORS[0]).encode(fill=fill)
    return line.mark_line(color=COLORS[0], strokeWidth=1).encode(x, y) + marks
