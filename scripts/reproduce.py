"""Run a finished run again from what its folder holds, and compare the two bit for bit.

python scripts/reproduce.py RUN_DIR [--into NEW_DIR]

Settings, seed and budget are those of RUN_DIR/config.json. What differs here from where the run was made
(commit, changed files, versions, machine) is said first; other documents or another tokenizer show in the
first row of the metrics. Equal bit for bit is promised on the same machine, versions and device, of runs
whose budget is in steps or tokens. Status 0: equal; 1: not.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from windowlm.command_line import Invocation
from windowlm.config import TrainConfig, check_config
from windowlm.errors import UserError, exit_status
from windowlm.evaluation.result_files import RESULT_NAME
from windowlm.json_text import parse_json
from windowlm.model_folder import WEIGHTS_NAME
from windowlm.training.device import choose_device
from windowlm.training.peak_flops import device_name
from windowlm.training.provenance import provenance
from windowlm.training.run import train
from windowlm.training.run_folder import DIFF, LAST, RunFolder
from windowlm.training.same_run import differences

PLACES = ("git_commit", "python", "machine", "versions", "device")


def main() -> int:
    """Reproduce what the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR")
    parser.add_argument("--into", type=Path, metavar="NEW_DIR", help="keep the new run here")
    options = parser.parse_args()
    folder = RunFolder(options.run)
    record = folder.read_record()
    if record.get("status") != "finished":
        raise UserError(f"{options.run}: holds no finished run; finish it with resume=auto, or give another")
    for needed in (folder.checkpoints / LAST, folder.model / WEIGHTS_NAME, folder.evaluation / RESULT_NAME):
        if not needed.is_file():
            raise UserError(f"{needed}: is gone, so that nothing can be compared with it; give a whole run")
    config = read_config(folder.config)
    if config.trainer.max_steps is None and config.trainer.max_tokens is None:
        print("note: the budget was in seconds, so another run takes other steps", file=sys.stderr)
    for line in changes(record, folder, config):
        print(f"note: {line}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as scratch:
        new = options.into or Path(scratch, "run")
        again = replace(
            config, run_dir=str(new), resume=None, plan=False, logger=replace(config.logger, kind="none")
        )
        status = train(again, Invocation(output_dir=new, sweep_dir=None, command=f"reproduce {options.run}"))
        if status:
            return status
        found = differences(options.run, new)
    for line in found:
        print(line)
    print(f"{options.run}: {'not reproduced' if found else 'reproduced, equal bit for bit'}")
    return 1 if found else 0


def read_config(path: Path) -> TrainConfig:
    """The settings of the run.

    Raises:
        UserError: they cannot be read.
    """
    try:
        return check_config(TrainConfig, parse_json(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def changes(record: dict[str, Any], folder: RunFolder, config: TrainConfig) -> list[str]:
    """What is not here as it was where the run was made."""
    here = {**provenance(), "device": device_name(choose_device(config))}
    found = [
        f"{name} was {json.dumps(record.get(name))} and is {json.dumps(here[name])}"
        for name in PLACES
        if record.get(name) != here[name]
    ]
    if (folder.path / DIFF).exists():
        found.append(f"the run's code differed from its commit by {folder.path / DIFF}")
    return found


if __name__ == "__main__":
    sys.exit(exit_status(main))
