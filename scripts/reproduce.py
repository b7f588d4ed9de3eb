"""Run a finished run again from what its folder holds, and compare the two bit for bit.

python scripts/reproduce.py RUN_DIR [--into NEW_DIR]

Settings, seed and budget are those of RUN_DIR/config.json; as many processes are started, with as many
threads, as RUN_DIR/run.json says, and relative paths of the settings begin in the folder where the run was
started. What differs here from where the run was made (commit, changed files, versions, machine) is said
first; other documents or another tokenizer show in the first row of the metrics. Equal bit for bit is
promised on the same machine, versions and device, of runs whose budget is in steps or tokens, the same from
the beginning to the end, and which one number of processes has made. Status 0: equal; 1: not.
"""

import argparse
import json
import os
import sys
import tempfile
from contextlib import chdir, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from windowlm.command_line import MOST_PROCESSES, Invocation
from windowlm.config import TrainConfig, check_config
from windowlm.data.arrow_store import filled_cache
from windowlm.errors import USAGE_ERROR, UserError, exit_status
from windowlm.evaluation.result_files import RESULT_NAME
from windowlm.json_text import parse_json
from windowlm.model_folder import WEIGHTS_NAME
from windowlm.parallel.launcher import LAUNCHED, launch
from windowlm.parallel.place import own_place
from windowlm.training.device import choose_device
from windowlm.training.earlier_starts import MADE_BY, PLACES, recorded_starts
from windowlm.training.peak_flops import device_name
from windowlm.training.provenance import provenance
from windowlm.training.run import train
from windowlm.training.run_folder import DIFF, LAST, RunFolder
from windowlm.training.same_run import differences


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
    if LAUNCHED in os.environ and own_place().size > 1:
        assert options.into is not None
        return one_of_several(config, record, options.run, options.into)
    count = processes_of(record, config, options.run)
    torch.set_num_threads(threads_of(record))
    for line in changes(record, folder, config):
        print(f"note: {line}", file=sys.stderr)
    # Another folder is entered before the end.
    run = options.run.absolute()
    with tempfile.TemporaryDirectory() as scratch:
        new = (options.into or Path(scratch, "run")).absolute()
        if count == 1:
            status = train_again(config, record, run, new)
        else:
            os.environ["OMP_NUM_THREADS"] = str(threads_of(record))
            words = [sys.executable, str(Path(__file__).resolve()), str(run), "--into", str(new)]
            status = launch(count, words, f"{options.run} was not run again")
        if status:
            return status
        found = differences(run, new)
    for line in found:
        print(line)
    print(f"{options.run}: {'not reproduced' if found else 'reproduced, equal bit for bit'}")
    return 1 if found else 0


def train_again(config: TrainConfig, record: dict[str, Any], run: Path, new: Path) -> int:
    """Train as the run did, from the folder in which it was started; the exit status."""
    torch.set_num_threads(threads_of(record))
    work = working_folder(record)
    with nullcontext() if work is None else chdir(work):
        data = replace(config.data, cache_dir=filled_cache(config.data.cache_dir))
        logger = replace(config.logger, kind="none")
        began_from = first_state(record)
        # A run that was made in pieces is run again in one.
        trainer = replace(config.trainer, max_time=None)
        again = replace(
            config,
            run_dir=str(new),
            resume=began_from,
            plan=False,
            data=data,
            logger=logger,
            trainer=trainer,
        )
        return train(again, Invocation(output_dir=new, sweep_dir=None, command=f"reproduce {run}"))


def one_of_several(config: TrainConfig, record: dict[str, Any], run: Path, new: Path) -> int:
    """The part of one process that was started here for a run of several; the exit status."""
    try:
        return train_again(config, record, run, new)
    except UserError:
        # All find the same mistake.
        if own_place().speaks:
            raise
        return USAGE_ERROR


def processes_of(record: dict[str, Any], config: TrainConfig, run: Path) -> int:
    """How many processes the run had.

    Raises:
        UserError: that many cannot be started here.
    """
    # Not recorded by earlier versions, of which devices alone are known.
    count = record.get("processes", config.trainer.devices)
    if type(count) is not int or count < 1:
        raise UserError(f"{run}: run.json says processes={json.dumps(count)}; a number from 1 on is allowed")
    if own_place().size > 1:
        raise UserError(
            f"{run}: was made by {count} processes, which this script starts itself; call it without "
            "torchrun or srun"
        )
    if choose_device(config).type == "cuda" and count > torch.cuda.device_count():
        room = f"this machine shows {torch.cuda.device_count()} GPUs"
    elif count > (most := max(MOST_PROCESSES, os.cpu_count() or 1)):
        room = f"at most {most} are started on a machine of {os.cpu_count()} cores"
    else:
        return count
    raise UserError(f"{run}: was made by {count} processes, and {room}; reproduce it on a larger machine")


def threads_of(record: dict[str, Any]) -> int:
    """Threads of each process of the run."""
    threads = record.get("threads")
    return threads if type(threads) is int and 0 < threads <= 1024 else torch.get_num_threads()


def first_state(record: dict[str, Any]) -> str | None:
    """Folder of the run from whose state this one started; None where it started from none."""
    origin = record.get("began_from")
    return origin if isinstance(origin, str) else None


def working_folder(record: dict[str, Any]) -> Path | None:
    """Where the run was started; None where that is not known or not here."""
    work = record.get("working_folder")
    return Path(work) if isinstance(work, str) and Path(work).is_dir() else None


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
    """What is not here as it was where the run was made, and what else stands against equality."""
    here = {**provenance(), "device": device_name(choose_device(config))}
    if isinstance(then := record.get("versions"), dict):
        # Records of earlier versions tell of fewer packages.
        here["versions"] = {name: now for name, now in here["versions"].items() if name in then}
    found = [
        f"{name} was {json.dumps(record.get(name))} and is {json.dumps(here[name])}"
        for name in PLACES
        if record.get(name) != here[name]
    ]
    if (folder.path / DIFF).exists():
        found.append(f"the run's code differed from its commit by {folder.path / DIFF}")
    if config.trainer.max_steps is None and config.trainer.max_tokens is None:
        found.append("the budget was in seconds, so another run takes other steps")
    for start in recorded_starts(record):
        was = [
            f"{name} was {json.dumps(start.get(name))}"
            for name in MADE_BY
            if start.get(name) != record.get(name)
        ]
        code = start["code_difference"]
        was.append("the code as its commit has it" if code is None else f"the code differed by {code}")
        found.append(f"its steps up to {start['until_step']} were made by another start: {', '.join(was)}")
    if record.get("processes_changed"):
        found.append("the run went on with another number of processes, so one number adds in other orders")
    if record.get("budget_changed"):
        found.append("the run went on with another budget, which planned its learning rates anew")
    if (origin := first_state(record)) is not None:
        found.append(f"the run started from the newest state of {origin}, which may be another one by now")
    relative = [
        path
        for path in (
            config.data.path,
            config.data.exclude,
            config.data.cache_dir,
            config.tokenizer.path,
            config.model.init_from,
        )
        if path is not None and not Path(path).is_absolute()
    ]
    if relative and working_folder(record) is None:
        found.append(
            f"the run was started in {json.dumps(record.get('working_folder'))}, which is not here, so "
            f"{relative[0]} is looked for in {Path.cwd()}"
        )
    return found


if __name__ == "__main__":
    sys.exit(exit_status(main))
