"""A text as a task of lm-evaluation-harness that scores the tokens of our naive figure, and no others.

The harness cuts a text into windows of ``max_length`` tokens that do not overlap, each with the token before
it as its first input, as `evaluation.targets.naive_windows` does. It differs at both ends: its first window
starts with a mark, and its last, when it is shorter, sees more. So the text of the task is that of the
targets alone, a whole number of windows, and the mark is the token before them.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from windowlm.atomic_write import write_atomically
from windowlm.errors import UserError
from windowlm.tokenization.tokenizer import Tokenizer

TASK = "windowlm_text"
TEXT_NAME, DATA_NAME, TASK_NAME = "text.txt", "targets.jsonl", f"{TASK}.yaml"
# Characters that may be dropped in front so that the cut at the first target is one between tokens.
MOST_DROPPED = 1000
TASK_FILE = """\
task: {task}
dataset_path: json
dataset_kwargs:
  data_files: {data}
output_type: loglikelihood_rolling
test_split: train
doc_to_text: ""
doc_to_target: targets
metric_list:
  - metric: bits_per_byte
"""


@dataclass(frozen=True)
class HarnessTask:
    """Files of a task.

    Attributes:
        text: what our evaluation scores.
        folder: for the harness's ``--include_path``.
        prefix_token: for its ``prefix_token_id``.
        targets: tokens that both score.
    """

    text: Path
    folder: Path
    prefix_token: int
    targets: int


def write_harness_task(tokenizer: Tokenizer, text: str, context_length: int, folder: Path) -> HarnessTask:
    """Write a text for our evaluation, and the task of the same targets for the harness.

    Args:
        tokenizer: of the model.
        text: at least two contexts long.
        context_length: c, the harness's ``max_length``.
        folder: made; must not exist.

    Raises:
        UserError: the folder exists, the text is too short, or a file cannot be written; the folder is then
            removed again.
    """
    for dropped in range(min(MOST_DROPPED, len(text))):
        tokens = tokenizer.encode(text[dropped:])
        count = (len(tokens) - context_length) // context_length * context_length
        if count < 1:
            break
        tokens = tokens[: context_length + count]
        whole, targets = (tokenizer.decode(piece) for piece in (tokens, tokens[context_length:]))
        cut = np.concatenate([tokens[:context_length], tokenizer.encode(targets)])
        if np.array_equal(tokenizer.encode(whole), tokens) and np.array_equal(cut, tokens):
            return _written(folder, whole, targets, int(tokens[context_length - 1]), count)
    raise UserError(
        f"context_length={context_length}: the text has {len(tokenizer.encode(text)):,} tokens, and a "
        "context and a window of targets must fit in, cut between tokens; give a longer text, or a shorter "
        "context"
    )


def _written(folder: Path, text: str, targets: str, prefix_token: int, count: int) -> HarnessTask:
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"out={folder}: {error.strerror}; give a folder that does not exist") from None
    data = json.dumps(str((folder / DATA_NAME).absolute()))
    files = {
        TEXT_NAME: text,
        DATA_NAME: json.dumps({"targets": targets}) + "\n",
        TASK_NAME: TASK_FILE.format(task=TASK, data=data),
    }
    try:
        for name, content in files.items():
            write_atomically(folder / name, content.encode(), inside=folder)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(
            f"out={folder}: {error.filename} cannot be written: {error.strerror}; the folder was removed: "
            "make room, or give another"
        ) from None
    return HarnessTask(folder / TEXT_NAME, folder, prefix_token, count)
