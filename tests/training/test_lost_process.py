"""A process of a run is killed: all end soon, with one message, and the run goes on from its checkpoint."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from tests.conftest import PROJECT, run_script
from tests.parallel.processes import LOOPBACK, free_port, run_in_processes
from tests.training.killed_processes import SECONDS_TO_END, TORCHRUN, send_to_one, told
from tests.training.runs import record, rows, steps_saved
from windowlm.errors import UserError
from windowlm.parallel.launcher import LAUNCHED, launch, starter
from windowlm.parallel.own_gpu import own_gpu
from windowlm.parallel.place import Place
from windowlm.parallel.processes import (
    LostProcessError,
    Processes,
    ending_together,
    is_loss,
    noticing_losses,
)
from windowlm.training.given_settings import given_settings
from windowlm.training.run import TrainingRun, train
from windowlm.training.run_folder import RunFolder
from windowlm.training.run_screen import RunScreen
from windowlm.training.signals import Signals
from windowlm.training.stopping import INTERRUPTED, Stopping

ENDLESS = "trainer.max_steps=1000000"


def test_a_killed_process_ends_all_with_one_message_and_the_run_goes_on(
    small_run: tuple[str, ...], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    common = (*small_run, f"run_dir={folder}", "trainer.device=cpu", "trainer.validate_every_n_steps=10")
    ending = send_to_one(folder, "1", signal.SIGKILL, *common, ENDLESS)
    # One run for both.
    assert len(list(folder.glob("wandb/offline-run-*"))) == 1
    assert ending.status == 1
    assert ending.errors.splitlines() == [
        "error: process 1 of 2 was ended by SIGKILL, and with it all others; resume=auto goes on from the "
        "last checkpoint, or starts anew where none was saved"
    ]
    step = steps_saved(folder)
    finished = run_script(
        "train.py", *common, "resume=auto", f"trainer.max_steps={step + 10}", "logger=none", cwd=tmp_path
    )
    assert finished.returncode == 0, finished.stderr
    assert record(folder)["status"] == "finished"
    assert rows(folder)[-1]["step"] == step + 10


def test_one_of_those_that_are_left_tells_of_a_leader_that_was_killed_under_torchrun(
    small_run: tuple[str, ...], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    words = (*small_run, f"run_dir={folder}", "trainer.device=cpu", "trainer.validate_every_n_steps=10")
    ending = send_to_one(
        folder, "0", signal.SIGKILL, *words, "logger=none", ENDLESS, launcher=TORCHRUN, OMP_NUM_THREADS="1"
    )
    assert ending.status == 1
    assert told(ending.errors) == [
        "error: another process of this run has ended; resume=auto goes on from the last checkpoint"
    ]


def test_a_signal_to_one_process_saves_one_state_and_gives_the_job_back_once(
    small_run: tuple[str, ...], tmp_path: Path
) -> None:
    folder, calls = tmp_path / "run", tmp_path / "calls"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    words = (*small_run, f"run_dir={folder}", "trainer.device=cpu", "trainer.validate_every_n_steps=10")
    ending = send_to_one(
        folder,
        "1",
        signal.SIGUSR1,
        *words,
        "logger=none",
        ENDLESS,
        SLURM_JOB_ID="4711",
        PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}",
    )
    assert ending.status == 75, ending.errors
    assert ending.screen.count("the state is saved, resume=auto goes on") == 1
    assert calls.read_text() == "requeue 4711\n"
    assert record(folder)["status"] == "stopped"
    assert steps_saved(folder) >= 10


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        (("data.batch_size=3", "run_dir=run"), ("try: python", "data.batch_size=4")),
        (("data.path=empty.txt", "run_dir=run"), ("data.path='empty.txt': empty",)),
        (("run_dir=/proc/run",), ("run_dir=/proc/run: cannot be written",)),
    ],
)
def test_a_mistake_is_told_once(
    mistake: tuple[str, ...], said: tuple[str, ...], small_run: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "empty.txt").write_text("")
    words = (*small_run, "trainer.device=cpu", "trainer.devices=2", *mistake)
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "test", LAUNCHED: "1"}
    place |= {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(free_port())}

    def start(rank: str) -> subprocess.CompletedProcess[str]:
        own = {**place, "RANK": rank, "LOCAL_RANK": rank}
        return run_script("train.py", *words, cwd=tmp_path, environment=own)

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(start, ("0", "1")))
    errors = "".join(process.stderr for process in done)
    assert [process.returncode for process in done] == [2, 2]
    assert errors.count("error: ") == 1
    assert all(word in errors for word in said)
    assert "Traceback" not in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("step", [True, False])
def test_two_tasks_of_slurm_train_together_and_a_batch_script_alone(
    step: bool, small_run: tuple[str, ...], tmp_path: Path
) -> None:
    words = (*small_run, "trainer.device=cpu", "trainer.max_steps=2", "logger=none", "run_dir=run")
    job = {"SLURM_JOB_ID": str(free_port())[-4:], "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2"}
    job |= {"SLURM_NODEID": "0", "SLURM_NODELIST": LOOPBACK}
    job |= {"MASTER_PORT": str(free_port())}
    of_step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"} if step else {}

    def start(rank: str) -> subprocess.CompletedProcess[str]:
        own = {**job, **of_step, "SLURM_PROCID": rank, "SLURM_LOCALID": rank, "OMP_NUM_THREADS": "1"}
        return run_script("train.py", *words, cwd=tmp_path, environment=own)

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(start, ("0", "1") if step else ("0",)))
    assert [process.returncode for process in done] == [0] * len(done), done[0].stderr
    assert record(tmp_path / "run")["status"] == "finished"


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "python"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}, "srun python"),
        ({"LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "x"}, "torchrun --nproc-per-node 4"),
        ({"LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}, "torchrun --nnodes 2 --nproc-per-node 2"),
        ({"LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "x", LAUNCHED: "1"}, "python"),
    ],
)
def test_commands_that_are_suggested_start_as_many_processes(environment: dict[str, str], said: str) -> None:
    if "LOCAL_WORLD_SIZE" in environment:
        environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4", **environment}
    assert starter(environment) == said
    assert given_settings(f"{said} 'a=b/train.py' data.path=x --seed=1 -m seed=1,2") == {
        "data.path": "data.path=x",
        "seed": "seed=1,2",
    }


@pytest.mark.parametrize(("code", "status"), [("0", 0), ("int(os.environ['RANK']) * 3", 3)])
def test_the_launcher_returns_the_status_of_its_processes(code: str, status: int) -> None:
    assert launch(2, [sys.executable, "-c", f"import os, sys; sys.exit({code})"], "") == status


def test_the_launcher_tells_of_a_process_that_ended_and_left_others(
    capfd: pytest.CaptureFixture[str],
) -> None:
    code = "import os, sys; sys.exit(75 if os.environ['RANK'] == '1' else 1)"
    assert launch(2, [sys.executable, "-c", code], "SAVED") == 75
    said = capfd.readouterr().err
    assert said == "error: process 1 of 2 ended with status 75, and with it all others; SAVED\n"


def test_the_launcher_ends_those_that_do_not_end_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("windowlm.parallel.launcher.SECONDS_AFTER_FAILURE", 0.5)
    stubborn = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "sys.exit(5) if os.environ['RANK'] == '1' else time.sleep(60)"
    )
    started = time.monotonic()
    assert launch(2, [sys.executable, "-c", stubborn], "") == 5
    assert time.monotonic() - started < 30


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux alone")
def test_processes_are_told_to_end_where_their_launcher_is_killed(tmp_path: Path) -> None:
    told = (
        "import os, pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
        "name = f'{os.environ[\"RANK\"]}.pid'\n"
        "pathlib.Path(name).write_text(str(os.getpid()))\n"
        "time.sleep(120)"
    )
    launches = "import sys; from windowlm.parallel.launcher import launch; launch(2, sys.argv[1:], '')"
    launcher = subprocess.Popen(
        [sys.executable, "-c", launches, sys.executable, "-c", told],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(PROJECT / "src")},
    )
    deadline = time.monotonic() + SECONDS_TO_END
    while len(written := [path for path in tmp_path.glob("*.pid") if path.read_text()]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    launcher.kill()
    launcher.wait()
    left = {int(path.read_text()) for path in written}
    while any(Path(f"/proc/{process}").exists() for process in left):
        assert time.monotonic() < deadline
        time.sleep(0.05)


STUCK = """
import os, signal, time
from windowlm.parallel import processes
processes.SECONDS_TO_UNWIND = 0.5
own = processes.Processes.join()
signal.signal(signal.SIGTERM, signal.SIG_IGN)
with processes.noticing_losses(own, lambda: "SAVED"):
    if own.rank == KILLED:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
"""


def run_by_torchrun(script: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *TORCHRUN, str(script)],
        env={**os.environ, "PYTHONPATH": str(PROJECT / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS_TO_END,
    )


@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_waits_for_its_gpu_notices_that_another_is_gone(killed: int, tmp_path: Path) -> None:
    """As in sleep, Python sees no signal there."""
    script = tmp_path / "stuck.py"
    script.write_text(STUCK.replace("KILLED", str(killed)))
    done = run_by_torchrun(script)
    assert done.returncode == 1
    assert told(done.stderr) == ["error: another process of this run has ended; SAVED"]


def take_leave(rank: int, size: int) -> bool:
    with noticing_losses(Processes(Place(rank, size, rank, size)), lambda: "SAVED"):
        pass
    return True


FAILING = """
import signal, sys, time
from windowlm.parallel import processes
processes.SECONDS_TO_UNWIND = 0.5
own = processes.Processes.join()
signal.signal(signal.SIGTERM, signal.SIG_IGN)
try:
    with processes.noticing_losses(own, lambda: "SAVED"):
        raise ValueError("on all")
except ValueError:
    time.sleep(0 if own.rank else 3)
    print("recorded by", own.rank, flush=True)
    sys.exit(2)
"""


def test_a_process_that_fails_ends_in_its_own_time(tmp_path: Path) -> None:
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    done = run_by_torchrun(script)
    assert "recorded by 0" in done.stdout
    assert "another process of this run has ended" not in done.stderr


def test_processes_that_end_well_miss_none_of_the_others(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_in_processes(3, take_leave, 3) == [True] * 3
    assert capfd.readouterr().err == ""


def test_a_torch_without_nccl_meets_by_gloo_and_leaves_the_message_to_the_check(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backends: list[str] = []
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("windowlm.parallel.processes._met", lambda _: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: backends.append(backend))
    monkeypatch.setattr(Processes, "gather", lambda _, value: [value])
    joined = Processes.join()
    assert backends == ["gloo"]
    with pytest.raises(UserError, match="NCCL"):
        own_gpu(torch.device("cuda"), joined.place, "trainer.devices")


def test_one_process_alone_tells_of_a_termination_and_closes_what_is_under_way(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    closed: list[str] = []
    work = ExitStack()
    work.callback(closed.append, "work")
    with pytest.raises(SystemExit) as ended, ending_together(Processes(), "SAVED"), work:
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 128 + signal.SIGTERM
    assert closed == ["work"]
    assert capsys.readouterr().err == "stopped: SIGTERM received; SAVED\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_error_that_is_behind_itself_says_no_loss() -> None:
    first, second = ValueError("first"), ValueError("second")
    first.__context__, second.__context__ = second, first
    assert not is_loss(first)
    second.__cause__ = LostProcessError("gone")
    assert is_loss(first)


def test_a_mistake_in_the_use_of_gloo_is_no_loss() -> None:
    assert not is_loss(
        RuntimeError("ProcessGroupGloo does not support reduce_scatter; gloo has no such kind")
    )
    assert is_loss(
        RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:553] Read error: reset by peer")
    )


@pytest.mark.parametrize("noticed", ["in the run", "as it ends"])
def test_a_signal_after_a_loss_still_leaves_its_message(
    noticed: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A launcher ends those that are left while they unwind from the loss that it has met as well."""
    monkeypatch.setattr(Processes, "join", lambda: Processes(Place(1, 2, 1, 2)))
    monkeypatch.setattr(Processes, "wait", lambda _: None)
    monkeypatch.setattr("windowlm.parallel.processes._is_first_to_tell", lambda: True)

    def lose(*_: object) -> int:
        try:
            raise LostProcessError("gone")
        finally:
            signal.raise_signal(signal.SIGTERM)

    unbegun = TrainingRun.__new__(TrainingRun)
    invocation = SimpleNamespace(output_dir=tmp_path, sweep_dir=None)
    vars(unbegun).update(
        processes=Processes.join(),
        invocation=invocation,
        folder=RunFolder(tmp_path),
        console=RunScreen(quiet=True),
        lock=SimpleNamespace(release=lambda: None),
        begun=False,
    )
    monkeypatch.setattr(TrainingRun, "_run" if noticed == "in the run" else "execute", lose)
    monkeypatch.setattr("windowlm.training.run.TrainingRun", lambda *_: unbegun)
    assert train(None, invocation) == INTERRUPTED  # type: ignore[arg-type]
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert errors == ["error: another process of this run has ended; nothing was saved yet"]


def test_a_signal_that_comes_while_processes_agree_still_gives_the_job_back() -> None:
    signals = Signals()

    def others(told: torch.Tensor) -> torch.Tensor:
        signals.requeues, signals.received = True, "SIGUSR1 received"
        return told

    processes = SimpleNamespace(size=2, leads=False, largest=others)
    stopping = Stopping(signals, None, 0.0, lambda _: False, processes)  # type: ignore[arg-type]
    assert stopping._agreed(1.0) == (0.0, False)
    assert signals.requeues
    assert stopping._agreed(2.0) == (0.0, True)
    assert signals.requeues
