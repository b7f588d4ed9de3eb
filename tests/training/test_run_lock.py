"""Two processes and one folder."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from tests.training.runs import begin, record
from windowlm.errors import UserError
from windowlm.training import run
from windowlm.training.run_folder import LOCK, RunFolder
from windowlm.training.run_lock import RunLock


def hold(folder: Path, told: int) -> None:
    """Hold the lock until the end, as the parent of a process that sleeps on after it."""
    RunLock(folder).take()
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    os.write(told, child.to_bytes(4, "little"))
    signal.pause()


def test_a_second_process_in_a_folder_is_refused_until_the_first_is_gone(
    documents: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert begin(folder, documents, tmp_path / "cache", trainer={"max_steps": 2}) == 0
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    told, tells = os.pipe()
    holder = multiprocessing.get_context("fork").Process(target=hold, args=(folder, tells))
    holder.start()
    sleeper = int.from_bytes(os.read(told, 4), "little")
    try:
        with pytest.raises(UserError, match=r"run_dir=.*run: another process is training in it"):
            begin(folder, documents, tmp_path / "cache", trainer={"max_steps": 4})
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
        holder.kill()
        holder.join()
        # What the killed one had forked, such as processes that load data, does not hold it.
        os.kill(sleeper, 0)
        assert begin(folder, documents, tmp_path / "cache", trainer={"max_steps": 4}) == 0
    finally:
        holder.kill()
        os.kill(sleeper, signal.SIGKILL)
    assert record(folder)["status"] == "finished"


def test_a_folder_that_another_process_has_written_meanwhile_is_left_as_it_is(
    documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = run.prepare_tokens

    def prepare_while_another_begins(*arguments: object) -> object:
        RunFolder(tmp_path / "run").update_record(status="finished", budget=[9, None, None])
        return prepare(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(run, "prepare_tokens", prepare_while_another_begins)
    with pytest.raises(UserError, match="another process has written it since this one began"):
        begin(tmp_path / "run", documents, tmp_path / "cache")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [LOCK, "run.json"]
    assert record(tmp_path / "run") == {"status": "finished", "budget": [9, None, None]}


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.lockf", none)
    RunLock(tmp_path).take()
    assert "cannot be locked (Operation not supported)" in capsys.readouterr().err


def test_a_folder_with_a_lock_alone_is_free(documents: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).touch()
    assert begin(tmp_path / "run", documents, tmp_path / "cache", trainer={"max_steps": 1}) == 0
