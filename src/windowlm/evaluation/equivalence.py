"""Whether two losses are equal within a margin: two one-sided tests (Schuirmann 1987)."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import t as student_t

MARGIN = 0.002  # bits per byte
LEVEL = 0.05


@dataclass(frozen=True)
class Equivalence:
    """A verdict on ``|mean| < margin``.

    Attributes:
        margin: largest difference that counts as none, in the unit of the differences.
        p: the larger of both one-sided p-values.
        equivalent: p is at most the level; otherwise nothing is said, least of all that they differ.
    """

    margin: float
    p: float
    equivalent: bool


def equivalence(
    differences: npt.ArrayLike, margin: float = MARGIN, level: float = LEVEL
) -> Equivalence | None:
    """Test that the mean difference lies within the margin; None with a single cluster.

    A p-value above 0.05 of the usual test says that no difference was seen, which small samples always say.
    This test has to see that there is none: it claims equality only where the ``1 - 2 level`` t interval of
    the mean lies inside ``(-margin, margin)``, and errs in at most ``level`` of the cases.

    Args:
        differences: one figure a cluster, such as bits per byte.
        margin: largest difference that counts as none.
        level: largest chance of a false claim.
    """
    values = np.asarray(differences, dtype=np.float64)
    assert values.ndim == 1
    assert margin > 0
    if values.size < 2:
        return None
    return equivalence_of(
        float(values.mean()), float(values.std(ddof=1)) / values.size**0.5, values.size - 1, margin, level
    )


def equivalence_of(
    mean: float,
    standard_error: float,
    degrees_of_freedom: float,
    margin: float = MARGIN,
    level: float = LEVEL,
) -> Equivalence:
    """The same from a mean with its standard error, as ``seed_variation`` gives them."""
    if standard_error == 0:
        p = 0.0 if abs(mean) < margin else 1.0
    else:
        p = float(student_t.sf((margin - abs(mean)) / standard_error, degrees_of_freedom))
    return Equivalence(margin, p, p <= level)
