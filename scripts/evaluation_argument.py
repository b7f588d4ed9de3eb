"""The option `--evaluation` of scripts that read evaluated runs: a folder in each run."""

import argparse
from pathlib import Path
from typing import Any

from windowlm.evaluation.result_files import OWN_EVALUATION


def add_evaluation_argument(parser: argparse.ArgumentParser, **changes: Any) -> None:
    """Add it, with a default unless `changes` say otherwise."""
    options: dict[str, Any] = {
        "default": OWN_EVALUATION,
        "help": "folder in each run that holds the evaluation; evaluation_NAME for data.path=NAME "
        "(default: %(default)s, of the run's own data)",
    }
    parser.add_argument("--evaluation", metavar="NAME", type=_name, **options | changes)


def _name(given: str) -> str:
    if Path(given).name != given:
        raise argparse.ArgumentTypeError("it is the name of a folder in each run, not a path")
    return given
