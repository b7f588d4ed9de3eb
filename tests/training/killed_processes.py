"""Kill one of two processes of a run, and let the run go on.

python -m tests.training.killed_processes

Each way of sharing is tried, on GPUs over NCCL where there are two: how long the others take to end, what is
said, where the run went on, and what differs then from one that nothing disturbed. Prints JSON, and ends with
1 where something lasted too long, was not said once, began anew or differs.
"""

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.conftest import PROJECT, SMALL_RUN, write_documents
from tests.training.runs import steps_saved
from windowlm.training.peak_flops import device_name
from windowlm.training.provenance import provenance
from windowlm.training.same_run import differences

SECONDS_TO_BEGIN = 240
SECONDS_TO_END = 60
SECONDS_TO_FINISH = 300
SECONDS_BETWEEN_LOOKS = 0.02
# Of steps that are lost, behind the first save.
SECONDS_BEHIND_A_SAVE = 0.25
STEPS = 400
DEVICES = "trainer.devices=2"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
# The way of sharing, what starts the processes, which of them is killed, and further settings.
CASES = (
    ("ddp", (), "1", ("trainer.compile=on",)),
    ("ddp", TORCHRUN, "0", ("trainer.compile=off",)),
    ("fsdp2", (), "1", ("trainer.compile=off",)),
    ("context", TORCHRUN, "1", ("trainer.compile=on",)),
    ("context", (), "0", ("trainer.compile=off",)),
)


@dataclass(frozen=True)
class Ending:
    """How a run ended, and how many seconds after the signal."""

    status: int
    screen: str
    errors: str
    seconds: float


def told(errors: str) -> list[str]:
    """Our own lines; torchrun adds a report."""
    return [line for line in errors.splitlines() if line.startswith("error: ")]


def processes_of(parent: int) -> dict[str, int]:
    """The children of a launcher by their RANK."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) != parent:
                continue
            variables = (folder / "environ").read_bytes().split(b"\0")
        except (OSError, IndexError, ValueError):
            continue
        found |= {
            variable[5:].decode(): int(folder.name) for variable in variables if variable[:5] == b"RANK="
        }
    return found


def command_of(words: tuple[str, ...], launcher: tuple[str, ...] = ()) -> list[str]:
    """That of a run of two processes."""
    devices = () if launcher else (DEVICES,)
    return [sys.executable, *launcher, str(PROJECT / "train.py"), *words, *devices]


def send_to_one(
    folder: Path, rank: str, number: signal.Signals, *words: str, launcher: tuple[str, ...] = (), **extra: str
) -> Ending:
    """Begin a run of two processes, one of which gets a signal a little after a state was first saved."""
    running = subprocess.Popen(
        command_of(words, launcher),
        cwd=folder.parent,
        env={**os.environ, "HOME": str(folder.parent), "WANDB_MODE": "offline", **extra},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + SECONDS_TO_BEGIN
        while not (folder / "checkpoints" / "last.ckpt").exists() and time.monotonic() < deadline:
            assert running.poll() is None, running.communicate()
            time.sleep(SECONDS_BETWEEN_LOOKS)
        assert (folder / "checkpoints" / "last.ckpt").exists(), f"not saved in {SECONDS_TO_BEGIN} s"
        time.sleep(SECONDS_BEHIND_A_SAVE)
        os.kill(processes_of(running.pid)[rank], number)
        sent = time.monotonic()
        screen, errors = running.communicate(timeout=SECONDS_TO_END)
    finally:
        # A launcher that is killed leaves its processes.
        for process in processes_of(running.pid).values():
            os.kill(process, signal.SIGKILL)
        running.kill()
    return Ending(running.returncode, screen, errors, time.monotonic() - sent)


def finish(words: tuple[str, ...], launcher: tuple[str, ...], cwd: Path) -> int | None:
    """Begin a run or go on with it, to its end; returns the step where it went on."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command_of(words, launcher),
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS_TO_FINISH,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    went_on = re.search(r"going on from step ([\d,]+) of", done.stdout)
    return None if went_on is None else int(went_on[1].replace(",", ""))


def killed(
    base: Path, kind: str, launcher: tuple[str, ...], rank: str, settings: tuple[str, ...]
) -> dict[str, Any]:
    """One case."""
    words = (f"parallel={kind}", "logger=none", f"trainer.max_steps={STEPS}", "resume=auto", *settings)
    whole, cut = base / "whole", base / "killed"
    base.mkdir()
    ending = send_to_one(
        cut, rank, signal.SIGKILL, *words, f"run_dir={cut}", launcher=launcher, OMP_NUM_THREADS="1"
    )
    saved = steps_saved(cut)
    went_on_from = finish((*words, f"run_dir={cut}"), launcher, base)
    finish((*words, f"run_dir={whole}"), launcher, base)
    return {
        "parallel": kind,
        "launcher": "torchrun" if launcher else DEVICES,
        "killed": int(rank),
        "settings": settings[-1],
        "seconds_to_end": round(ending.seconds, 1),
        "status": ending.status,
        "errors": told(ending.errors),
        "tracebacks": ending.errors.count("Traceback"),
        "saved": saved,
        "went_on_from": went_on_from,
        "steps": steps_saved(cut),
        "different": differences(cut, whole),
    }


def main() -> int:
    """Try all cases, several at a time."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    two_gpus = torch.cuda.device_count() > 1
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if two_gpus else "cpu")
    parser.add_argument("--cases", nargs="+", type=int, default=range(len(CASES)), help="by number, from 0")
    parser.add_argument("--at-once", type=int, default=len(CASES) if two_gpus else 1, help="cases")
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = write_documents(folder / "texts")
        common = (
            *SMALL_RUN,
            f"data.path={texts}",
            "data.batch_size=null",
            f"trainer.device={options.device}",
            "trainer.validate_every_n_steps=200",
            "checkpoint.every_n_steps=20",
        )
        if options.device == "cuda":
            common += ("precision=bf16-mixed", "trainer.deterministic=true")

        def one(number: int) -> dict[str, Any]:
            kind, launcher, rank, settings = CASES[number]
            own = (*common, f"data.cache_dir={folder / f'cache {number}'}", *settings)
            try:
                found = killed(folder / f"case {number}", kind, launcher, rank, own)
            except (AssertionError, subprocess.TimeoutExpired) as error:
                found = {"parallel": kind, "failed": str(error)}
            print(found, file=sys.stderr, flush=True)
            return found

        with ThreadPoolExecutor(options.at_once) as pool:
            cases = list(pool.map(one, options.cases))
    report = {
        **provenance(),
        "command": shlex.join(["python", "-m", "tests.training.killed_processes", *sys.argv[1:]]),
        "device": device_name(torch.device(options.device)),
        "seconds": round(time.monotonic() - started, 1),
        "cases": cases,
    }
    print(json.dumps(report, indent=1))
    return int(not all(map(went_well, cases)))


def went_well(case: dict[str, Any]) -> bool:
    """Whether it ended in time, with one message, and went on to the same end."""
    return (
        "failed" not in case
        and case["seconds_to_end"] <= SECONDS_TO_END
        and case["status"] == 1
        and len(case["errors"]) == 1
        and case["went_on_from"] == case["saved"]
        and case["steps"] == STEPS
        and not case["different"]
    )


if __name__ == "__main__":
    raise SystemExit(main())
