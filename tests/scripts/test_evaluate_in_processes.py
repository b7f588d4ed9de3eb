"""``scripts/evaluate.py`` by several processes: one is killed, all end with one message, and others go on."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.conftest import PROJECT, WORDS, run_script
from tests.training.killed_processes import SECONDS_TO_BEGIN, SECONDS_TO_END, processes_of


def test_a_killed_process_ends_all_and_another_number_goes_on(
    finished_run: tuple[Path, str], tmp_path: Path
) -> None:
    text, out = tmp_path / "long.txt", tmp_path / "out"
    text.write_text(" ".join(random.Random(0).choices(WORDS, k=60_000)))
    words = (
        f"checkpoint={finished_run[0]}",
        f"data.path={text}",
        f"output_dir={out}",
        "device=cpu",
        "evaluation.context_lengths=[8,16]",
    )
    running = subprocess.Popen(
        [sys.executable, str(PROJECT / "scripts" / "evaluate.py"), *words, "devices=2"],
        cwd=tmp_path,
        env={**os.environ, "HOME": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + SECONDS_TO_BEGIN
        while not any(out.glob("unfinished/*.npz")) and time.monotonic() < deadline:
            assert running.poll() is None, running.communicate()
            time.sleep(0.02)
        os.kill(processes_of(running.pid)["1"], signal.SIGKILL)
        _, errors = running.communicate(timeout=SECONDS_TO_END)
    finally:
        running.kill()
    assert running.returncode == 1
    assert [line for line in errors.splitlines() if line.startswith(("error", "stopped", "Traceback"))] == [
        "error: process 1 of 2 was ended by SIGKILL, and with it all others; what has been scored is kept, "
        "and the same command goes on"
    ]
    assert any(out.glob("unfinished/*.npz"))
    finished = run_script("scripts/evaluate.py", *words, "devices=3", cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr.count("perplexity by context length: going on, ") == 1
    assert finished.stdout.count("results in") == 1
    rows = json.loads((out / "length.json").read_text())["rows"]
    assert [row["context_length"] for row in rows] == [8, 16]
    assert not (out / "unfinished").exists()


def test_a_mistake_is_told_once(finished_run: tuple[Path, str], tmp_path: Path) -> None:
    done = run_script(
        "scripts/evaluate.py",
        f"checkpoint={finished_run[0]}",
        f"data.path={tmp_path / 'nothing.txt'}",
        "device=cpu",
        "devices=2",
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert "nothing.txt" in done.stderr
