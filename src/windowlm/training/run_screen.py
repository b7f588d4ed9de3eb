"""The screen of a run, which goes on where nobody reads it any more."""

import sys

from rich.console import Console

from windowlm.errors import silence


class RunScreen(Console):
    """Standard output until its reader is gone, as of ``| head`` or of a pager that was left.

    What a run makes lies in its folder, and days of training do not depend on who looks on.
    """

    def on_broken_pipe(self) -> None:
        """Say so on standard error, and be quiet; rich would end the process with status 1 and no word."""
        self.quiet = True
        silence(sys.stdout)
        try:
            print(
                "warning: nobody reads standard output any more; the run goes on", file=sys.stderr, flush=True
            )
        except OSError:  # both have had one reader
            silence(sys.stderr)
