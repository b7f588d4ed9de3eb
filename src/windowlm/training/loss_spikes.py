"""Which logged losses jump out of those before them."""

import statistics
from collections import deque
from collections.abc import Iterable

REMEMBERED = 32
FEWEST = 8
# In robust standard deviations, of which one is 1.4826 times the median absolute deviation.
DEVIATIONS = 6.0
# Losses that hardly differ would otherwise make a spike of nothing.
SMALLEST_RISE = 0.02


class LossSpikes:
    """Compare each logged loss with the median of the last 32 before it."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=REMEMBERED)

    def height(self, loss: float) -> float | None:
        """Take a loss; by how much it exceeds the median before it, None where that is no spike."""
        before = list(self._losses)
        self._losses.append(loss)
        if len(before) < FEWEST:
            return None
        median = statistics.median(before)
        deviation = 1.4826 * statistics.median(abs(value - median) for value in before)
        rise = loss - median
        return rise if rise > max(DEVIATIONS * deviation, SMALLEST_RISE * median) else None

    def state(self) -> list[float]:
        """The losses that are remembered."""
        return list(self._losses)

    def restore(self, losses: Iterable[float]) -> None:
        """Remember these."""
        self._losses = deque(losses, maxlen=REMEMBERED)
