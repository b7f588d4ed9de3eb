"""Compare evaluated runs: a folder of runs in one table, plot and page, or two runs in detail.

python scripts/compare_runs.py FOLDER
python scripts/compare_runs.py RUN RUN [--evaluation evaluation_NAME]
"""

import argparse
import shlex
import sys
from pathlib import Path

from evaluation_argument import add_evaluation_argument
from rich.console import Console

from windowlm.errors import UserError, exit_status
from windowlm.evaluation.comparison import read_run
from windowlm.evaluation.comparison_report import compare_folder, compare_two
from windowlm.study.comparison_page import write_comparison_page
from windowlm.study.measure_comparison import measures_table, paired_measures

PIPED_WIDTH = 100


def main() -> int:
    """Compare what the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", metavar="FOLDER", nargs="+", type=Path)
    add_evaluation_argument(parser)
    given = parser.parse_args()
    folders = given.folders
    if len(folders) > 2:
        parser.error("give one folder of runs, or two run folders")
    console = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)
    try:
        if len(folders) == 1:
            compare_folder(folders[0], console, given.evaluation)
            page = write_comparison_page(folders[0], given.evaluation)
            console.out(shlex.quote(str(page)), highlight=False)
        else:
            compare_two(*folders, console, given.evaluation)
            runs = [read_run(folder, given.evaluation) for folder in folders]
            pairs, left_out = paired_measures(*runs)
            if pairs:
                console.print(measures_table(pairs))
            for sentence in left_out:
                console.print(sentence, highlight=False, markup=False)
    except OSError as error:
        if error.filename is None:  # of the screen
            raise
        raise UserError(f"{error.filename}: {error.strerror}") from None
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
