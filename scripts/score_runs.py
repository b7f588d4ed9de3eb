"""Score all finished runs of a folder in the same way, in pieces where time is short.

python scripts/score_runs.py FOLDER [--seconds 540] [key=value ...]

The settings are those of `scripts/evaluate.py`, which is called for one run after the other; its option
`checkpoint` is set here, and `devices=N` shares the scoring of each run among processes. After `--seconds`
the run at hand is stopped, with what it has scored kept, and the status is 75: the same command goes on. Runs
that were scored with the same settings are passed over, also where their weights are no more; others without
weights are named at the end, with status 1.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from windowlm.atomic_write import json_bytes, write_atomically
from windowlm.errors import USAGE_ERROR, exit_status
from windowlm.evaluation.comparison import runs_in
from windowlm.model_folder import IN_RUN, WEIGHTS_NAME
from windowlm.parallel.place import own_place
from windowlm.study.packed_runs import SCORED, read_scored

UNFINISHED = 75
PATIENCE_SECONDS = 20


def main() -> int:
    """Score what the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="of the runs, also in folders below")
    parser.add_argument("--seconds", type=float, help="stop after so many (default: never)")
    given, settings = parser.parse_known_args()
    if wrong := [word for word in settings if "=" not in word or word.startswith("-")]:
        parser.error(f"{wrong[0]}: not a setting of the form key=value")
    if given.seconds is not None and not given.seconds > 0:
        parser.error("--seconds: above 0; try --seconds 540")
    if (place := own_place()).size > 1:
        if place.speaks:
            print("error: start this without torchrun or srun, and give devices=N", file=sys.stderr)
        return USAGE_ERROR
    deadline = None if given.seconds is None else time.monotonic() + given.seconds
    finished = [run.folder for run in runs_in(given.folder) if (run.folder / IN_RUN).is_dir()]
    without_weights = []
    for number, folder in enumerate(finished, start=1):
        record = folder / SCORED
        if settings in (scored := read_scored(record)):
            continue
        if not (folder / IN_RUN / WEIGHTS_NAME).is_file():
            without_weights.append(str(folder))
            continue
        print(f"{number} of {len(finished)}: {folder}", flush=True)
        status = evaluate(folder, settings, deadline)
        if status is None:
            print("time is up; the same command goes on")
            return UNFINISHED
        if status:
            return USAGE_ERROR if status == USAGE_ERROR else 1
        write_atomically(record, json_bytes([*scored, settings]))
    print(f"{len(finished) - len(without_weights)} runs are scored")
    if without_weights:
        print(
            f"error: not scored so, and without weights here: {', '.join(without_weights)}", file=sys.stderr
        )
        return 1
    return 0


def evaluate(folder: Path, settings: list[str], deadline: float | None) -> int | None:
    """Status of `scripts/evaluate.py`, None where time ran out."""
    script = Path(__file__).with_name("evaluate.py")
    process = subprocess.Popen([sys.executable, str(script), f"checkpoint={folder}", *settings])
    try:
        return process.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


if __name__ == "__main__":
    sys.exit(exit_status(main))
