"""Intervals of claims about a setting: both the authors and the training seeds vary.

Shape letters: S seeds of a setting, N authors.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import t as student_t

from windowlm.evaluation.paired_difference import CONFIDENCE


@dataclass(frozen=True)
class SettingDifference:
    """Second setting minus first, over authors and seeds.

    ``low`` and ``high`` are None where a setting has one seed or there is one author: the claim is then about
    these very models.
    """

    mean: float
    low: float | None
    high: float | None
    standard_error: float | None
    degrees_of_freedom: float | None
    authors: int
    seeds: tuple[int, int]


def setting_difference(
    first_SN: npt.ArrayLike, second_SN: npt.ArrayLike, confidence: float = CONFIDENCE
) -> SettingDifference:
    """Mean of the second setting minus that of the first, with authors and seeds as crossed random effects.

    Each trained seed of a setting is scored on the same authors, so that neither is nested in the other. The
    variance of the mean has three independent parts, each estimated from its own means: the authors'
    differences (averaged over seeds) over N, and each setting's seed means (averaged over authors) over its
    S. Their sum counts the interaction of seed and author in both, so that it errs to the wide side (Owen
    2007, "The pigeonhole bootstrap", Annals of Applied Statistics 1, bounds the variance of crossed effects
    so). Its degrees of freedom are those of Satterthwaite (1946). The seeds of two settings are unrelated
    draws: equal numbers start different models.

    Args:
        first_SN: bits per byte of each seed and author, ``[S1, N]``.
        second_SN: of the other setting, on the same authors, ``[S2, N]``.
        confidence: coverage asked for.
    """
    one_SN, two_SN = (np.asarray(values, dtype=np.float64) for values in (first_SN, second_SN))
    assert one_SN.ndim == two_SN.ndim == 2
    assert one_SN.shape[1] == two_SN.shape[1]
    authors = one_SN.shape[1]
    seeds = (one_SN.shape[0], two_SN.shape[0])
    differences_N = two_SN.mean(axis=0) - one_SN.mean(axis=0)
    mean = float(differences_N.mean())
    if authors < 2 or min(seeds) < 2:
        return SettingDifference(mean, None, None, None, None, authors, seeds)
    parts = [
        (float(values.var(ddof=1)) / values.size, values.size - 1)
        for values in (differences_N, one_SN.mean(axis=1), two_SN.mean(axis=1))
    ]
    variance = sum(part for part, _ in parts)
    if variance == 0:
        return SettingDifference(mean, mean, mean, 0.0, float(authors - 1), authors, seeds)
    degrees_of_freedom = variance**2 / sum(part**2 / freedom for part, freedom in parts)
    standard_error = variance**0.5
    half_width = float(student_t.ppf((1 + confidence) / 2, degrees_of_freedom)) * standard_error
    return SettingDifference(
        mean, mean - half_width, mean + half_width, standard_error, degrees_of_freedom, authors, seeds
    )
