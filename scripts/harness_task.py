"""Write a text as a task of lm-evaluation-harness that scores the same tokens as our naive figure.

python scripts/harness_task.py CHECKPOINT TEXT_FILE CONTEXT_LENGTH OUT_FOLDER
"""

import argparse
import shlex
import sys
from pathlib import Path

from windowlm.bundle import load
from windowlm.errors import UserError, exit_status
from windowlm.interchange.harness_task import TASK, write_harness_task
from windowlm.model_folder import ModelFolder, find_model_folder


def main() -> int:
    """Write the files, and say the two commands whose figures are equal."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="an exported folder, or a model of the hub")
    parser.add_argument("text", metavar="TEXT_FILE", type=Path)
    parser.add_argument("context_length", metavar="CONTEXT_LENGTH", type=int)
    parser.add_argument("out", metavar="OUT_FOLDER", type=Path, help="must not exist")
    given = parser.parse_args()
    if given.context_length < 1:
        parser.error("CONTEXT_LENGTH counts tokens, from 1 on")
    try:
        text = given.text.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{given.text}: cannot be read as UTF-8 text: {error}") from None
    _check_opens(find_model_folder(given.checkpoint), given.checkpoint)
    task = write_harness_task(load(given.checkpoint).tokenizer, text, given.context_length, given.out)
    settings = (
        f"pretrained={given.checkpoint},dtype=float32,max_length={given.context_length},"
        f"prefix_token_id={task.prefix_token}"
    )
    ours = (f"checkpoint={given.checkpoint}", f"data.path={task.text}")
    lengths = f"evaluation.context_lengths=[{given.context_length}]"
    print(f"{task.targets:,} targets; these two give the same bits per byte (ours as naive bits/byte):")
    print(shlex.join(["python", "scripts/evaluate.py", *ours, lengths]))
    theirs = ("--model", "hf", "--model_args", settings, "--tasks", TASK, "--include_path", str(task.folder))
    print(shlex.join(["lm_eval", *theirs, "--batch_size", "8"]))
    return 0


def _check_opens(folder: ModelFolder, checkpoint: str) -> None:
    """Refuse what the harness could not open."""
    if not folder.foreign:
        raise UserError(
            f"CHECKPOINT {checkpoint}: the harness opens folders in transformers' layout; write one with "
            f"python scripts/export.py checkpoint={shlex.quote(checkpoint)} to=transformers out=FOLDER"
        )
    if "," in checkpoint:
        raise UserError(
            f"CHECKPOINT {checkpoint}: the harness cuts its arguments at commas; rename the folder"
        )


if __name__ == "__main__":
    sys.exit(exit_status(main))
