"""P-values of several comparisons, adjusted so that one false claim among them stays rare (Holm 1979)."""

from collections.abc import Sequence


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values, in the order given: reject those at most the level.

    The i-th smallest of m is multiplied by m - i + 1, and none may fall below a smaller one's. The chance of
    any false rejection is then at most the level, whatever the dependence between the tests.
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, p_values[index] * (len(p_values) - rank)))
        adjusted[index] = largest
    return adjusted
