"""Compare evaluated runs: a folder of runs in one table and one plot, or two runs in detail.

python scripts/compare_runs.py FOLDER
python scripts/compare_runs.py RUN RUN
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from windowlm.errors import UserError
from windowlm.evaluation.comparison_report import compare_folder, compare_two

PIPED_WIDTH = 160


def main() -> int:
    """Run the command; 2 is the status of a user's mistake."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", metavar="FOLDER", nargs="+", type=Path)
    folders = parser.parse_args().folders
    if len(folders) > 2:
        parser.error("give one folder of runs, or two run folders")
    console = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)
    try:
        if len(folders) == 1:
            compare_folder(folders[0], console)
        else:
            compare_two(*folders, console)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
