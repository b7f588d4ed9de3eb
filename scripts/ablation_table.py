"""What each change of a sweep gives over its seeds: table, JSON and curves of the runs in a folder.

python scripts/ablation_table.py FOLDER
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from windowlm.errors import exit_status
from windowlm.evaluation.ablation_report import report_ablation

PIPED_WIDTH = 160


def main() -> int:
    """Report on the folder that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="of a sweep; its first run is the base")
    given = parser.parse_args()
    report_ablation(given.folder, Console(width=None if sys.stdout.isatty() else PIPED_WIDTH))
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
