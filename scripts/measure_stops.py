"""Measure how long runs take to end after a signal or at their wall-clock limit, and with which status.

python scripts/measure_stops.py
python scripts/measure_stops.py --out FOLDER
python scripts/measure_stops.py --only "two SIGINT" --repeats 5

The model is that of the default run, W&B writes offline. Each run is a process of its own, told to end a
random while after its first logged step; the seconds count from the last signal. Status 1 where one ends
late, otherwise than promised, unsaved, or without having ended W&B, whose file must hold each step of the
metrics once and that the run has left. The load of the machine stands beside each, as others on its cores
make a stop slower. A run that a second SIGINT reaches behind its last line dies of it, which shells call 130
as well.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from out_argument import out_folder
from synthetic_text import BYTES, write_text

from windowlm.training.checkpoint_io import damage
from windowlm.training.offline_wandb import history_differences
from windowlm.training.peak_flops import device_name
from windowlm.training.provenance import provenance

TRAIN = Path(__file__).parents[1] / "train.py"
LONGEST = 30.0
STOPPED = (75,)
LEFT_AT_ONCE = (130, -signal.SIGINT)
# Name, signals, settings beside the usual, statuses.
CASES: tuple[tuple[str, Sequence[signal.Signals], Sequence[str], tuple[int, ...]], ...] = (
    ("SIGTERM", [signal.SIGTERM], [], STOPPED),
    ("SIGINT", [signal.SIGINT], [], STOPPED),
    ("SIGUSR1", [signal.SIGUSR1], [], STOPPED),
    ("SIGTERM in a long validation", [signal.SIGTERM], ["trainer.validate_every_n_steps=1"], STOPPED),
    # A validation is still at work when the second comes.
    (
        "two SIGINT",
        [signal.SIGINT, signal.SIGINT],
        ["trainer.validate_every_n_steps=1"],
        LEFT_AT_ONCE,
    ),
    ("trainer.max_time", [], [], STOPPED),
)
# Two signals that come before the process runs again are one to it, on a busy machine too.
APART = 0.5
MAX_TIME = 45.0


def main() -> int:
    """Stop the runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=[case[0] for case in CASES], help="one kind of stop (default: all)")
    parser.add_argument("--out", type=out_folder, metavar="FOLDER", help="write stops.json")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats}: a number from 1 on is allowed; try --repeats 2")
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "text").mkdir()
        words = write_text(Path(scratch) / "text", BYTES, 2_000_000, 0)
        rows = [
            stop(Path(scratch), f"{number}-{repeat}", words, case, draw)
            for number, case in enumerate(CASES)
            for repeat in range(options.repeats)
            if options.only in (None, case[0])
        ]
    slowest = max(row["seconds"] for row in rows)
    holds = all(row["holds"] for row in rows)
    print(
        f"{len(rows)} stops, the slowest after {slowest:.1f} s, {'all' if holds else 'not all'} as promised"
    )
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        report = {
            **provenance(),
            "device": device_name(torch.device("cpu")),
            "cores": os.cpu_count(),
            "command": " ".join(["python", *sys.argv]),
            "slowest_seconds": slowest,
            "holds": holds,
            "rows": rows,
        }
        (options.out / "stops.json").write_text(json.dumps(report, indent=1) + "\n")
    return 0 if holds else 1


def stop(
    scratch: Path,
    name: str,
    words: list[str],
    case: tuple[str, Sequence[signal.Signals], Sequence[str], tuple[int, ...]],
    draw: random.Random,
) -> dict[str, Any]:
    """Start a run, end it, and say what came of it."""
    kind, signals, settings, expected = case
    run = scratch / name
    limit = [] if signals else [f"trainer.max_time={MAX_TIME}"]
    usual = [
        f"run_dir={run}", f"data.cache_dir={scratch / 'cache'}", "trainer.max_steps=100_000",
        "trainer.log_every_n_steps=1", "trainer.device=cpu", "logger.mode=offline", *limit,
    ]  # fmt: skip
    started = time.monotonic()
    with (scratch / f"{name}.txt").open("w") as screen:
        process = subprocess.Popen(
            [sys.executable, str(TRAIN), *words, *usual, *settings], stdout=screen, stderr=screen
        )
        if signals:
            while not (run / "metrics.jsonl").exists() and process.poll() is None:
                time.sleep(0.1)
            time.sleep(3 * draw.random())
            for place, number in enumerate(signals):
                time.sleep(APART if place else 0)
                started = time.monotonic()
                os.kill(process.pid, number)
        status = process.wait()
    # Of the last minute: processes that run or wait to.
    load = os.getloadavg()[0]
    seconds = time.monotonic() - started - (0.0 if signals else MAX_TIME)
    saved = run / "checkpoints" / "last.ckpt"
    whole = saved.exists() and damage(saved) is None
    # One that leaves at once ends neither.
    wandb_lacks = [] if status in LEFT_AT_ONCE else history_differences(run, evaluated=False)
    row = {
        "stop": kind,
        "seconds": seconds,
        "load": load,
        "status": status,
        "saved": whole,
        "wandb_lacks": wandb_lacks,
        "holds": status in expected
        and seconds <= LONGEST
        and (whole or status in LEFT_AT_ONCE)
        and not wandb_lacks,
    }
    print(row, flush=True)
    if not row["holds"]:
        print((scratch / f"{name}.txt").read_text()[-2000:], file=sys.stderr)
    return row


if __name__ == "__main__":
    sys.exit(main())
