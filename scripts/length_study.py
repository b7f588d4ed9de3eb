"""Tables, plots and the answer of a length study, from the folders of its runs.

python scripts/length_study.py FOLDER --evaluation evaluation_NAME [--out docs/results/length_study]
    [--page docs/length-study-results.md]

FOLDER holds the runs, also in folders below; `scripts/score_runs.py` has scored them. Written are
`length_study.json` (with the command, the commit and every claim), the main table and all claims as CSV,
plots as PNG, and a page in Markdown whose sentences are made from the numbers.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

from evaluation_argument import add_evaluation_argument
from out_argument import out_folder
from rich.console import Console

from windowlm.atomic_write import json_bytes, write_atomically
from windowlm.errors import UserError, exit_status
from windowlm.evaluation.html_page import shown
from windowlm.evaluation.result_files import csv_of_rows
from windowlm.study.answer import Answer, answer_of, main_rows, plots
from windowlm.study.setting_report import claim_rows
from windowlm.training.provenance import provenance


def main() -> int:
    """Report on the folder that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    add_evaluation_argument(parser, default=None, required=True, help="folder in each run")
    parser.add_argument("--base", metavar="CELL", help="compare with; default: full attention at its best")
    parser.add_argument("--out", type=out_folder, default=Path("docs/results/length_study"))
    parser.add_argument("--page", type=Path, help="default: README.md in the folder of --out")
    given = parser.parse_args()
    answer = answer_of(given.folder, given.evaluation, given.base)
    command = "python " + shlex.join(sys.argv)
    rows = main_rows(answer)
    pictures = plots(answer)
    report = {
        "command": command,
        **provenance(),
        "evaluation": given.evaluation,
        "base": answer.base,
        "runs": {cell.name: [str(run.folder) for run in cell.runs] for cell in answer.cells},
        "main": rows,
        "claims": claim_rows(answer.claims),
        "sentences": answer.sentences,
    }
    page = given.page or given.out / "README.md"
    files = {
        given.out / "main.csv": csv_of_rows(rows).encode(),
        given.out / "claims.csv": csv_of_rows(claim_rows(answer.claims)).encode(),
        **{given.out / name: content for name, content in pictures.items()},
        page: markdown(answer, rows, list(pictures), given.out, page.parent, command).encode(),
        given.out / "length_study.json": json_bytes(report),
    }
    try:
        for path, content in files.items():
            write_atomically(path, content)
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from None
    console = Console()
    for question, sentences in answer.sentences.items():
        console.out(f"{question}\n  " + "\n  ".join(sentences), highlight=False)
    for path in files:
        console.out(shlex.quote(str(path)), highlight=False)
    return 0


def markdown(
    answer: Answer,
    rows: list[dict[str, object]],
    pictures: list[str],
    out: Path,
    page_folder: Path,
    command: str,
) -> str:
    """The answer page."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    place = os.path.relpath(out, page_folder)
    lines = [
        "# The length study: what was found",
        "",
        f"Made from [length_study.json]({place}/length_study.json) by `{command}`. Differences are against "
        f"{answer.base} unless another is named; intervals hold 95%, over authors and training seeds where a "
        "cell has two or more, and over authors alone where it has one.",
        "",
        "| " + " | ".join(name.replace("_", " ") for name in columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(shown(row.get(name)) for name in columns) + " |" for row in rows),
    ]
    for question, sentences in answer.sentences.items():
        lines += ["", f"## {question}", "", *(f"- {sentence}" for sentence in sentences)]
    lines += ["", *(f"![{name.removesuffix('.png').replace('_', ' ')}]({place}/{name})" for name in pictures)]
    lines += ["", "Not shown: other sizes than this one, other corpora, other training lengths.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(exit_status(main))
