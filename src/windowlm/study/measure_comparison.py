"""Two runs by everything that was measured of both: paired differences over authors."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from windowlm.evaluation.bootstrap_t import bootstrap_t
from windowlm.evaluation.comparison import Run
from windowlm.evaluation.report import add_columns, interval_text
from windowlm.evaluation.result import Interval, interval
from windowlm.study.author_values import LOSS, Figure, author_values, comparable, measured_differently

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class PairedMeasure:
    """A figure of two runs, means over authors, and second minus first with its bootstrap-t interval."""

    figure: Figure
    first: float
    second: float
    difference: Interval


def paired_measures(first: Run, second: Run) -> tuple[list[PairedMeasure], list[str]]:
    """What both runs have besides the loss by context length, and what was measured differently, in words.

    Raises:
        UserError: they scored different text.
    """
    one, two = author_values(first), author_values(second)
    differing = measured_differently(one, two)
    if differing:
        one, two = author_values(first, differing), author_values(second, differing)
    pairs = []
    for figure in comparable(first, one, second, two):
        if figure.measure == LOSS:
            continue
        here, there = one.values[figure], two.values[figure]
        values = np.array([(here[author], there[author]) for author in here])
        pairs.append(
            PairedMeasure(
                figure,
                float(values[:, 0].mean()),
                float(values[:, 1].mean()),
                interval(bootstrap_t(values[:, 1] - values[:, 0])),
            )
        )
    return pairs, [
        f"{name} is left out: it was measured with different {', '.join(settings)}; measure both with the "
        "same study settings"
        for name, settings in differing.items()
    ]


def measures_table(pairs: list[PairedMeasure]) -> "Table":
    """For the terminal."""
    from rich.table import Table

    table = Table(
        title="what averages hide",
        title_justify="left",
        caption="Means over authors, and the second run minus the first with its 95% bootstrap-t interval "
        "over authors; c is the longest context within the training of both. Of far repeats and key words "
        "less is better, of what a pasted copy saves and of right choices more is.",
        caption_justify="left",
    )
    add_columns(table, ["measure", "", "first", "second", "difference ± 95%", "authors"], left=2)
    for pair in pairs:
        table.add_row(
            pair.figure.measure,
            pair.figure.label,
            f"{pair.first:.4f}",
            f"{pair.second:.4f}",
            interval_text(pair.difference),
            f"{pair.difference['pairs']:,}",
        )
    return table
