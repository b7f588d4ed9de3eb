"""Progress as lines on standard error, for files and pipes, where no bar is drawn."""

import sys
import time

SECONDS_BETWEEN = 10.0


class ProgressLines:
    """Say from time to time how far something has come; what ends sooner says nothing.

    Args:
        description: what is being done.
        shown: False says nothing at all.
    """

    def __init__(self, description: str, *, shown: bool) -> None:
        self.description = description
        self.shown = shown
        self._started = self._said = time.monotonic()

    def update(self, done: int, total: int) -> None:
        """Take note of the progress.

        Args:
            done: of ``total``, which is above 0.
            total: all there is to do.
        """
        now = time.monotonic()
        if self.shown and now - self._said >= SECONDS_BETWEEN:
            self._said = now
            print(
                f"{self.description} {done / total:>4.0%} {now - self._started:>6,.0f} s",
                file=sys.stderr,
                flush=True,
            )
