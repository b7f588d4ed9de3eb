"""The mean of paired differences with its t interval (Student 1908)."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import t as student_t

CONFIDENCE = 0.95


@dataclass(frozen=True)
class PairedDifference:
    """Mean of ``second - first`` over ``pairs`` and its interval, None for a single pair."""

    mean: float
    low: float | None
    high: float | None
    pairs: int


def paired_difference(
    first: npt.ArrayLike, second: npt.ArrayLike, confidence: float = CONFIDENCE
) -> PairedDifference:
    """Unweighted mean of ``second - first`` over the pairs, with ``mean +- t * s / sqrt(n)``.

    A pair is one document measured twice, so what makes a document hard cancels. Each document counts
    once, whatever its length: the estimate is about the next document, not about the next byte.

    Args:
        first: one figure a document, such as bits per byte.
        second: the same documents in the same order.
        confidence: coverage of the interval when the differences are normal.
    """
    differences = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    assert differences.ndim == 1
    assert differences.size >= 1
    mean = float(differences.mean())
    if differences.size == 1:
        return PairedDifference(mean, None, None, 1)
    standard_error = float(differences.std(ddof=1)) / differences.size**0.5
    half_width = float(student_t.ppf((1 + confidence) / 2, differences.size - 1)) * standard_error
    return PairedDifference(mean, mean - half_width, mean + half_width, differences.size)
