"""Claims about settings: every cell of a sweep against one of them, over authors and training seeds.

Shape letters: S seeds of a setting, N authors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.stats import t as student_t

from windowlm.errors import UserError
from windowlm.evaluation.bootstrap_t import bootstrap_t
from windowlm.evaluation.comparison import Run, runs_by_setting
from windowlm.evaluation.equivalence import LEVEL, equivalence, equivalence_of
from windowlm.evaluation.multiple_comparisons import holm
from windowlm.evaluation.paired_difference import paired_difference
from windowlm.evaluation.result import trained_context
from windowlm.evaluation.seed_variation import setting_difference
from windowlm.study.author_values import AuthorValues, Figure, author_values, comparable

AUTHORS_AND_SEEDS, AUTHORS = "authors and seeds", "authors"


@dataclass(frozen=True)
class SettingClaim:
    """A figure of a setting beside that of the base.

    Attributes:
        figure: what it is of.
        setting: the cell's name.
        seeds: of the base and of the cell.
        authors: how many.
        base, mean: means over authors and seeds.
        difference: cell minus base.
        low, high: 95% interval, None where there is none.
        over: what the interval is over. Authors alone, where a cell has a single seed: it is then about these
            models and not about the setting.
        p: that there is no difference; None without an interval over seeds.
        p_holm: the same after Holm's correction over all cells and groups of the measure.
        equal: losses alone: equality within the margin is shown, Holm over the same; None otherwise.
    """

    figure: Figure
    setting: str
    seeds: tuple[int, int]
    authors: int
    base: float
    mean: float
    difference: float
    low: float | None
    high: float | None
    over: str
    p: float | None
    p_holm: float | None
    equal: bool | None


@dataclass(frozen=True)
class _Measured:
    claim: SettingClaim
    p_equal: float | None


def evaluated_cells(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Evaluated runs by setting, as ``runs_by_setting`` calls them.

    Raises:
        UserError: none is evaluated, or two runs of a setting have the same seed.
    """
    evaluated = [run for run in runs if run.result is not None]
    if not evaluated:
        raise UserError(f"none of {len(runs)} runs is evaluated; score them first")
    cells = runs_by_setting(evaluated)
    for name, group in cells.items():
        seeds = [run.settings.get("seed", 0) for run in group]
        if len(set(seeds)) < len(seeds):
            folders = ", ".join(str(run.folder) for run in group)
            raise UserError(f"{name}: two runs have the same seed ({folders}); move one of them away")
    return cells


def compare_settings(
    cells: Mapping[str, Sequence[Run]], base: str, context: int | None = None
) -> list[SettingClaim]:
    """Each cell against the base, by every figure that all runs of both have.

    With two or more seeds on both sides the interval is that of ``setting_difference``. With a single one it
    is over authors alone: t of losses, bootstrap-t of what is skewed.

    Args:
        cells: runs of each setting.
        base: name of the one to compare with.
        context: context length at which far repeats and key words are compared; None for the
            ``trained_context`` of both cells.

    Raises:
        UserError: runs scored different text, or measured it differently.
    """
    values = {name: [author_values(run) for run in runs] for name, runs in cells.items()}
    found = []
    for name, runs in cells.items():
        if name == base:
            continue
        results = [run.result for run in (*cells[base], *runs) if run.result is not None]
        compared_at = trained_context(results) if context is None else context
        shared = _shared(cells[base], values[base], runs, values[name], compared_at)
        for figure in shared:
            one_SN = _matrix(figure, values[base])
            two_SN = _matrix(figure, values[name], like=values[base][0].values[figure])
            found.append(_measured(figure, name, one_SN, two_SN))
    return _corrected(found)


def _shared(
    base: Sequence[Run],
    base_values: Sequence[AuthorValues],
    runs: Sequence[Run],
    values: Sequence[AuthorValues],
    context: int | None,
) -> list[Figure]:
    """Figures of all runs of two cells; each run is compared with the first of the base."""
    first, first_values = base[0], base_values[0]
    others = [*zip(base[1:], base_values[1:], strict=True), *zip(runs, values, strict=True)]
    shared = [set(comparable(first, first_values, run, own, context)) for run, own in others]
    return sorted(set.intersection(*shared))


def _matrix(
    figure: Figure, values: Sequence[AuthorValues], like: Mapping[str, float] | None = None
) -> npt.NDArray[np.float64]:
    order = list(values[0].values[figure] if like is None else like)
    return np.array([[own.values[figure][author] for author in order] for own in values])


def _measured(
    figure: Figure, setting: str, one_SN: npt.NDArray[np.float64], two_SN: npt.NDArray[np.float64]
) -> _Measured:
    both = setting_difference(one_SN, two_SN)
    low, high, over, p, p_equal = both.low, both.high, AUTHORS_AND_SEEDS, None, None
    if both.standard_error is None or both.degrees_of_freedom is None:
        over = AUTHORS
        one_N, two_N = one_SN.mean(axis=0), two_SN.mean(axis=0)
        alone = bootstrap_t(two_N - one_N) if figure.skewed else paired_difference(one_N, two_N)
        low, high = alone.low, alone.high
        verdict = None if figure.skewed else equivalence(two_N - one_N)
        p_equal = None if verdict is None else verdict.p
    else:
        p = _p(both.mean, both.standard_error, both.degrees_of_freedom)
        if not figure.skewed:
            p_equal = equivalence_of(both.mean, both.standard_error, both.degrees_of_freedom).p
    claim = SettingClaim(
        figure=figure,
        setting=setting,
        seeds=both.seeds,
        authors=both.authors,
        base=float(one_SN.mean()),
        mean=float(two_SN.mean()),
        difference=both.mean,
        low=low,
        high=high,
        over=over,
        p=p,
        p_holm=None,
        equal=None,
    )
    return _Measured(claim, p_equal)


def _p(mean: float, standard_error: float, degrees_of_freedom: float) -> float:
    if standard_error == 0:
        return 1.0 if mean == 0 else 0.0
    return 2 * float(student_t.sf(abs(mean) / standard_error, degrees_of_freedom))


def _corrected(found: Sequence[_Measured]) -> list[SettingClaim]:
    """The claims with Holm's correction over all of a measure."""
    measures = list(dict.fromkeys(each.claim.figure.measure for each in found))
    claims = []
    for measure in measures:
        of_measure = [each for each in found if each.claim.figure.measure == measure]
        adjusted = iter(holm([each.claim.p for each in of_measure if each.claim.p is not None]))
        equal = iter(holm([each.p_equal for each in of_measure if each.p_equal is not None]))
        for each in of_measure:
            claims.append(
                replace(
                    each.claim,
                    p_holm=None if each.claim.p is None else next(adjusted),
                    equal=None if each.p_equal is None else next(equal) <= LEVEL,
                )
            )
    return claims
