"""Claims about the settings of a sweep for readers: tables for the terminal, CSV and JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from windowlm.atomic_write import json_bytes, write_atomically
from windowlm.errors import UserError
from windowlm.evaluation.comparison import runs_in
from windowlm.evaluation.equivalence import MARGIN
from windowlm.evaluation.report import add_columns, as_text
from windowlm.evaluation.result_files import OWN_EVALUATION, csv_of_rows
from windowlm.study.author_values import LOSS
from windowlm.study.setting_comparison import AUTHORS, SettingClaim, compare_settings, evaluated_cells

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def report_settings(
    folder: Path,
    console: "Console",
    evaluation: str = OWN_EVALUATION,
    base: str | None = None,
    facts: dict[str, Any] | None = None,
) -> list[Path]:
    """Print every setting of a sweep against one of them, and write ``settings.csv`` and ``.json`` there.

    Args:
        folder: of the runs.
        console: where to print.
        evaluation: which of the runs' evaluations; of another than their own the files are named after it.
        base: the setting to compare with, as the table calls it; None for that of the first run.
        facts: what the JSON says besides: command, commit, versions.

    Returns:
        The files.

    Raises:
        UserError: no such setting, fewer than two, or runs that cannot be compared.
    """
    runs = runs_in(folder, evaluation)
    cells = evaluated_cells(runs)
    if len(cells) < 2:
        raise UserError(f"{folder}: its evaluated runs have one setting, and a comparison needs two")
    chosen = next(iter(cells)) if base is None else base
    if chosen not in cells:
        raise UserError(f"--base {chosen}: there is no such setting; there are: {'; '.join(cells)}")
    claims = compare_settings(cells, chosen)
    for measure in dict.fromkeys(claim.figure.measure for claim in claims):
        console.print(_table(measure, chosen, [claim for claim in claims if claim.figure.measure == measure]))
    rows = claim_rows(claims)
    suffix = evaluation.removeprefix(OWN_EVALUATION)
    files = {
        folder / f"settings{suffix}.csv": csv_of_rows(rows).encode(),
        folder / f"settings{suffix}.json": json_bytes(
            {
                **(facts or {}),
                "evaluation": evaluation,
                "base": chosen,
                "runs": {name: [str(run.folder) for run in group] for name, group in cells.items()},
                "unfinished": [str(run.folder) for run in runs if run.result is None],
                "margin": MARGIN,
                "claims": rows,
            }
        ),
    }
    for path, content in files.items():
        write_atomically(path, content)
    return list(files)


def claim_rows(claims: Sequence[SettingClaim]) -> list[dict[str, Any]]:
    """Claims as flat objects."""
    rows = []
    for claim in claims:
        flat = asdict(claim)
        figure, seeds = flat.pop("figure"), flat.pop("seeds")
        rows.append(
            {
                "measure": figure["measure"],
                "group": figure["group"],
                "context": figure["context"],
                "setting": flat.pop("setting"),
                "seeds_base": seeds[0],
                "seeds": seeds[1],
                **flat,
            }
        )
    return rows


def _table(measure: str, base: str, claims: Sequence[SettingClaim]) -> "Table":
    from rich import box
    from rich.table import Table

    legend = (
        f"Against {base}: mean over authors and seeds, and the setting minus the base with its 95% interval. "
        "p: after Holm's correction over this table. "
    )
    if any(claim.over == AUTHORS for claim in claims):
        legend += (
            "°: a single seed on one side, so the interval is over authors alone and speaks of these models, "
            "not of the setting. "
        )
    if measure == LOSS:
        legend += (
            f"equal: two one-sided tests show a difference below {MARGIN}, Holm over this table; no is no "
            "proof of a difference."
        )
    table = Table(
        title=measure,
        caption=legend.strip(),
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        pad_edge=False,
    )
    headings = ["setting", "", "seeds", "base", "setting's", "difference", "95% interval", "p"]
    add_columns(table, headings + ["equal"] * (measure == LOSS), left=2)
    named = None
    for claim in claims:
        cells = [
            "" if claim.setting == named else claim.setting,
            claim.figure.label,
            f"{claim.seeds[0]}, {claim.seeds[1]}",
            f"{claim.base:.4f}",
            f"{claim.mean:.4f}",
            f"{claim.difference:+.4f}{'°' * (claim.over == AUTHORS)}",
            "" if claim.low is None else f"{claim.low:+.4f} to {claim.high:+.4f}",
            "" if claim.p_holm is None else f"{claim.p_holm:.2g}",
        ]
        if measure == LOSS:
            cells.append("" if claim.equal is None else "yes" if claim.equal else "no")
        named = claim.setting
        table.add_row(*map(as_text, cells))
    return table
