"""Claims about the settings of a sweep, over authors and training seeds: each setting against one of them.

python scripts/compare_settings.py FOLDER [--evaluation evaluation_NAME] [--base "model.window=128"]

Runs that differ in their seed alone are one setting. Whatever was measured of all of them is compared: the
loss at each context length, far repeats, key words, pasted spans.
"""

import argparse
import shlex
import sys
from pathlib import Path

from evaluation_argument import add_evaluation_argument
from rich.console import Console

from windowlm.errors import UserError, exit_status
from windowlm.study.setting_report import report_settings
from windowlm.training.provenance import provenance

PIPED_WIDTH = 140


def main() -> int:
    """Compare what the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="of the runs, also in folders below")
    add_evaluation_argument(parser)
    parser.add_argument(
        "--base", metavar="SETTING", help="as the table calls it; default: that of the first run"
    )
    given = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)
    facts = {"command": "python " + shlex.join(sys.argv), **provenance()}
    try:
        files = report_settings(given.folder, console, given.evaluation, given.base, facts)
    except OSError as error:
        if error.filename is None:  # of the screen
            raise
        raise UserError(f"{error.filename}: {error.strerror}") from None
    for path in files:
        console.out(shlex.quote(str(path)), highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
