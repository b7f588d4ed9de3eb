"""What each change of a sweep gives: its runs over seeds against those of the base, p-values corrected."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.stats import ttest_ind

from windowlm.errors import UserError
from windowlm.evaluation.comparison import Run, runs_by_setting, runs_in
from windowlm.evaluation.multiple_comparisons import holm
from windowlm.evaluation.result import trained_row

POINTS = 60  # of a curve


@dataclass(frozen=True)
class Curve:
    """Bits per byte of training text over a cell's runs: means at equal seconds and at equal bytes."""

    seconds: list[float]
    bits_at_seconds: list[float]
    bytes: list[float]
    bits_at_bytes: list[float]


@dataclass(frozen=True)
class Cell:
    """Runs of the same settings but for the seed.

    Attributes:
        label: the settings that differ from those of the base, as overrides.
        seeds: of the finished runs.
        scores: bits per byte of the evaluation's longest context, a seed each.
        unfinished: runs without an evaluation.
        parameters: of the model, None while no run is finished.
        bytes_trained: mean over the runs.
        curve: None where no run is finished.
    """

    label: str
    seeds: list[int]
    scores: list[float]
    unfinished: int
    parameters: int | None
    bytes_trained: float | None
    curve: Curve | None

    @property
    def mean(self) -> float | None:
        """Of the scores, None without any."""
        return float(np.mean(self.scores)) if self.scores else None

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the scores, None for fewer than two."""
        return float(np.std(self.scores, ddof=1)) if len(self.scores) > 1 else None


@dataclass(frozen=True)
class Effect:
    """A cell against the base.

    Attributes:
        cell: the cell.
        difference: its mean minus the base's; None where one has no score.
        p: of Welch's test, two-sided; None with fewer than two scores on a side, or without any spread.
        p_holm: the same after Holm's correction over all cells that have one.
    """

    cell: Cell
    difference: float | None
    p: float | None
    p_holm: float | None


def read_cells(folder: Path) -> list[Cell]:
    """Cells of a sweep; that of its first run is the base and comes first.

    Raises:
        UserError: no run there, or the runs scored different text.
    """
    runs = runs_in(folder)
    if len({run.result["targets_hash"] for run in runs if run.result is not None}) > 1:
        raise UserError(f"{folder}: its runs scored different text, so their losses cannot be compared")
    return [_cell(label, group) for label, group in runs_by_setting(runs).items()]


def effects(cells: Sequence[Cell]) -> list[Effect]:
    """Each cell after the first against the first.

    Welch's test (1947) takes no equal variances for granted. Holm's correction (1979) bounds the chance of
    one false claim in the whole table.
    """
    base, others = cells[0], cells[1:]
    found = [_p(cell.scores, base.scores) for cell in others]
    corrected = iter(holm([p for p in found if p is not None]))
    return [
        Effect(
            cell,
            None if cell.mean is None or base.mean is None else cell.mean - base.mean,
            p,
            None if p is None else next(corrected),
        )
        for cell, p in zip(others, found, strict=True)
    ]


def _p(scores: Sequence[float], base: Sequence[float]) -> float | None:
    if min(len(scores), len(base)) < 2:
        return None
    if len({*scores}) == len({*base}) == 1:
        return None  # without any spread there is nothing to measure a difference by
    return float(ttest_ind(scores, base, equal_var=False).pvalue)


def _cell(label: str, runs: Sequence[Run]) -> Cell:
    finished = [(run, run.result) for run in runs if run.result is not None]
    bytes_trained = [
        (result["tokens_trained"] or 0) * _bytes_per_token(run.folder) for run, result in finished
    ]
    return Cell(
        label=label,
        seeds=[int(run.settings.get("seed", 0)) for run, _ in finished],
        scores=[trained_row(result)["bits_per_byte"] for _, result in finished],
        unfinished=len(runs) - len(finished),
        parameters=finished[0][1]["parameters"] if finished else None,
        bytes_trained=float(np.mean(bytes_trained)) if bytes_trained else None,
        curve=_curve([run for run, _ in finished]),
    )


def _bytes_per_token(folder: Path) -> float:
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        train = record["prepared_data"]["train"]
        return float(train["bytes"] / train["tokens"])
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        raise UserError(f"{folder}/run.json: does not say how many bytes a token has") from None


def _curve(runs: Sequence[Run]) -> Curve | None:
    logged = [rows for run in runs if len(rows := _logged(run.folder))]
    if not logged:
        return None
    seconds, bits_at_seconds = _mean_curve([rows[:, [0, 2]] for rows in logged])
    seen, bits_at_bytes = _mean_curve([rows[:, [1, 2]] for rows in logged])
    return Curve(seconds, bits_at_seconds, seen, bits_at_bytes)


def _logged(folder: Path) -> npt.NDArray[np.float64]:
    """Seconds, bytes and bits per byte of each logged step, ``[rows, 3]``."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return np.empty((0, 3))
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    per_token = _bytes_per_token(folder)
    found = [
        (row["seconds"], row["tokens"] * per_token, row["train_bits_per_byte"])
        for row in rows
        if "train_bits_per_byte" in row
    ]
    return np.array(found, dtype=np.float64).reshape(-1, 3)


def _mean_curve(curves: Sequence[npt.NDArray[np.float64]]) -> tuple[list[float], list[float]]:
    """Mean of curves ``[rows, 2]`` over stretches of equal length from 0 to where the shortest ends.

    A row's loss is that of all steps since the row before.
    """
    edges = np.linspace(0.0, min(float(curve[-1, 0]) for curve in curves), POINTS + 1)
    means = []
    for curve in curves:
        places = np.concatenate([[0.0], curve[:, 0]])
        integral = np.concatenate([[0.0], np.cumsum(np.diff(places) * curve[:, 1])])
        means.append(np.diff(np.interp(edges, places, integral)) / np.diff(edges))
    return edges[1:].tolist(), np.mean(means, axis=0).tolist()
