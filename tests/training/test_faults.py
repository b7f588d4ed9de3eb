"""Damaged checkpoints, full disks, read-only and vanished folders, injected into small runs."""

import contextlib
import errno
import itertools
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.conftest import run_script
from tests.training.runs import begin, record, rows, steps_saved
from windowlm.bundle import load
from windowlm.errors import UserError, exit_status
from windowlm.parallel.processes import ALONE
from windowlm.training import checkpoint_io, metrics_log, run
from windowlm.training.checkpoint_io import damage
from windowlm.training.checkpoint_writer import CheckpointWriter
from windowlm.training.earlier_starts import MADE_BY
from windowlm.training.failed_writes import FailedWrites
from windowlm.training.lightning_module import LanguageModelModule
from windowlm.training.non_finite import NonFiniteWatch
from windowlm.training.offline_wandb import history_differences
from windowlm.training.provenance import provenance
from windowlm.training.run_folder import RunFolder
from windowlm.training.run_lock import RunLock

Start = Callable[..., int]
EVERY_STEP = {"every_n_steps": 1}


@pytest.fixture(scope="module")
def place(documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    shutil.copytree(documents, folder / "texts")
    return folder


@pytest.fixture(scope="module")
def uninterrupted(place: Path) -> Path:
    assert begin(place / "whole", place / "texts", place / "cache", checkpoint=EVERY_STEP) == 0
    return place / "whole"


@pytest.fixture
def start(place: Path) -> Start:
    """Start a run in a folder, or go on with it."""
    return lambda folder, **changes: begin(folder, place / "texts", place / "cache", **changes)


@pytest.fixture
def stopped(start: Start, tmp_path: Path) -> Path:
    """A run of six steps that ended without a word after its fourth."""
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        training_step = LanguageModelModule.training_step

        def ending(self: LanguageModelModule, *arguments: Any) -> Any:
            if self.batches_trained == 4:
                raise KeyboardInterrupt
            return training_step(self, *arguments)

        patch.setattr(LanguageModelModule, "training_step", ending)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            start(folder, checkpoint=EVERY_STEP)
    assert steps_saved(folder) == 4
    return folder


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda path: os.truncate(path, path.stat().st_size // 2), "its end is missing"),
    "last byte missing": (
        lambda path: os.truncate(path, path.stat().st_size - 1),
        "its end is missing",
    ),
    "bit-flipped": (flip, "its content is not that of its hash"),
    "empty": (lambda path: os.truncate(path, 0), "it is empty"),
    "zeros": (lambda path: path.write_bytes(bytes(path.stat().st_size)), "its end is missing"),
    "other file": (lambda path: shutil.copy(__file__, path), "its end is missing"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_state_is_named_and_the_one_before_it_used(
    name: str, stopped: Path, start: Start, uninterrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, what = DAMAGES[name]
    spoil(stopped / "checkpoints" / "last.ckpt")
    assert start(stopped, checkpoint=EVERY_STEP) == 0
    screen = capsys.readouterr()
    assert f"last.ckpt: damaged: {what}" in screen.err
    assert "previous.ckpt instead" in screen.err
    assert "going on from step 3 " in screen.out
    # The damaged one took the place of no good one.
    held = sorted(path.name for path in (stopped / "checkpoints").iterdir())
    assert held == ["best.ckpt", "damaged.ckpt", "last.ckpt", "previous.ckpt"]
    assert damage(stopped / "checkpoints" / "previous.ckpt") is None
    assert rows(stopped) == rows(uninterrupted)
    for path in ("model/model.safetensors", "evaluation/length.json"):
        assert (stopped / path).read_bytes() == (uninterrupted / path).read_bytes()


def test_a_state_that_other_settings_made_is_named_and_the_one_before_it_used(
    stopped: Path,
    start: Start,
    uninterrupted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert start(tmp_path / "other", seed=1, checkpoint=EVERY_STEP) == 0
    shutil.copy(tmp_path / "other" / "checkpoints" / "last.ckpt", stopped / "checkpoints" / "last.ckpt")
    capsys.readouterr()
    assert start(stopped, checkpoint=EVERY_STEP) == 0
    screen = capsys.readouterr()
    assert "last.ckpt: not of this run: seed=1 made it, not 0; going on from " in screen.err
    assert (stopped / "checkpoints" / "damaged.ckpt").is_file()
    assert rows(stopped) == rows(uninterrupted)
    assert start(tmp_path / "new", seed=1, resume=str(stopped), trainer={"max_steps": 8}) == 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"seed": 0, 5: torch.ones(2)}, "its settings are none; going on from "),
        ({"seed": torch.ones(2)}, "its settings are none; going on from "),
        (["seed"], None),
        ("missing", None),
        ("changeable", None),
    ],
)
def test_settings_of_a_state_that_are_none_or_may_change(
    settings: Any, said: str | None, stopped: Path, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    path = stopped / "checkpoints" / "last.ckpt"
    saved = checkpoint_io.AtomicCheckpointIO().load_checkpoint(path)
    own = saved["windowlm"].pop("settings")
    if settings != "missing":
        saved["windowlm"]["settings"] = {**own, "data.workers": 9} if settings == "changeable" else settings
    previous = path.with_name("previous.ckpt").read_bytes()
    checkpoint_io.AtomicCheckpointIO().save_checkpoint(saved, path)
    path.with_name("previous.ckpt").write_bytes(previous)
    assert start(stopped, checkpoint=EVERY_STEP) == 0
    screen = capsys.readouterr()
    assert said is None or said in screen.err
    assert ("going on from step 4 of" in screen.out) == (said is None)


def test_a_half_written_state_is_no_state(stopped: Path, start: Start, uninterrupted: Path) -> None:
    checkpoints = stopped / "checkpoints"
    shutil.copy(checkpoints / "last.ckpt", checkpoints / ".last.ckpt.partial-4711")
    os.truncate(checkpoints / ".last.ckpt.partial-4711", 1000)
    assert start(stopped, checkpoint=EVERY_STEP) == 0
    assert not list(checkpoints.glob(".*"))
    assert rows(stopped) == rows(uninterrupted)


def test_a_run_killed_between_the_two_renames_goes_on_from_the_previous_state(
    stopped: Path, start: Start, uninterrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (stopped / "checkpoints" / "last.ckpt").replace(stopped / "checkpoints" / "previous.ckpt")
    assert start(stopped, checkpoint=EVERY_STEP) == 0
    assert not capsys.readouterr().err
    assert rows(stopped) == rows(uninterrupted)


def test_two_damaged_states_end_in_one_message_and_change_nothing(stopped: Path, start: Start) -> None:
    for name in ("last.ckpt", "previous.ckpt"):
        os.truncate(stopped / "checkpoints" / name, 10)
    held = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"last\.ckpt: damaged.*previous\.ckpt: damaged.*No other state"):
        start(stopped)
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == held


def test_a_state_that_cannot_be_read_now_is_named_and_kept(
    stopped: Path, start: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    held = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    readers = ((checkpoint_io, "damage"), (torch, "load"))
    for (owner, reader), number in itertools.product(readers, (errno.EIO, errno.EACCES, errno.ESTALE)):

        def failing(*_: Any, number: int = number, **__: Any) -> None:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(owner, reader, failing)
            assert exit_status(lambda: start(stopped, checkpoint=EVERY_STEP)) == 2
        assert (
            f"last.ckpt: cannot be read: {os.strerror(number)}; nothing was changed"
            in capsys.readouterr().err
        )
        assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == held
    assert start(stopped, checkpoint=EVERY_STEP) == 0
    assert not (stopped / "checkpoints" / "damaged.ckpt").exists()


def test_a_damaged_line_of_the_metrics_is_named(stopped: Path, start: Start) -> None:
    lines = (stopped / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (stopped / "metrics.jsonl").write_bytes(b"".join([lines[0], b"\xff" + lines[1][1:], *lines[2:]]))
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is damaged"):
        start(stopped)


def test_rows_that_are_gone_are_said_to_be(
    stopped: Path, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (stopped / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (stopped / "metrics.jsonl").write_bytes(lines[0])
    assert start(stopped, checkpoint=EVERY_STEP, trainer={"max_steps": 5}) == 0
    assert "metrics.jsonl: 2 of the 3 rows up to step 4 are missing" in capsys.readouterr().err
    # Once is enough.
    assert start(stopped, checkpoint=EVERY_STEP) == 0
    assert "missing" not in capsys.readouterr().err


def test_a_row_that_was_not_written_is_said_to_be_there(
    stopped: Path, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (stopped / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (stopped / "metrics.jsonl").write_bytes(b"".join([lines[0], *lines]))
    assert start(stopped, checkpoint=EVERY_STEP) == 0
    said = "metrics.jsonl: 1 more than the 3 rows of step 4 are there"
    assert said in capsys.readouterr().err


def test_steps_of_another_start_keep_what_is_known_of_it(
    stopped: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = record(stopped)
    (stopped / "changes.diff").write_bytes(b"of the first start")
    commit = "another"
    monkeypatch.setattr(run, "provenance", lambda: {**provenance(), "git_commit": commit})
    assert start(stopped, checkpoint=EVERY_STEP) == 0
    after = record(stopped)
    (earlier,) = after["earlier_starts"]
    assert earlier["until_step"] == 4
    assert {name: earlier[name] for name in MADE_BY} == {name: before[name] for name in MADE_BY}
    assert (stopped / earlier["code_difference"]).read_bytes() == b"of the first start"
    assert after["git_commit"] == "another"
    # A start like the one before adds nothing, and one that took no step is none.
    for commit, steps, until in (("another", 7, [4]), ("third", 7, [4]), ("third", 8, [4, 7])):
        assert start(stopped, checkpoint=EVERY_STEP, trainer={"max_steps": steps}) == 0
        assert [each["until_step"] for each in record(stopped)["earlier_starts"]] == until, commit


def unwritable_from(monkeypatch: pytest.MonkeyPatch, step: int, number: int, times: int) -> list[int]:
    """Make writes of checkpoints and metrics fail from a step on, so many times."""
    failed: list[int] = []
    batches = [0]
    training_step = LanguageModelModule.training_step

    def counting(self: LanguageModelModule, *arguments: Any) -> Any:
        batches[0] = self.batches_trained + 1
        return training_step(self, *arguments)

    def failing(write: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            if batches[0] >= step and len(failed) < times:
                failed.append(batches[0])
                raise OSError(number, os.strerror(number))
            return write(*arguments, **options)

        return wrapped

    monkeypatch.setattr(LanguageModelModule, "training_step", counting)
    monkeypatch.setattr(checkpoint_io, "_write_hashed", failing(checkpoint_io._write_hashed))
    monkeypatch.setattr(metrics_log.MetricsLog, "write_all", failing(metrics_log.MetricsLog.write_all))
    return failed


UNWRITABLE = [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO]


@pytest.mark.parametrize("number", UNWRITABLE)
def test_a_run_that_cannot_write_stops_with_what_was_saved_before(
    number: int, start: Start, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        unwritable_from(patch, 4, number, 1)
        with pytest.raises(UserError, match=os.strerror(number)) as stop:
            start(folder, checkpoint=EVERY_STEP)
    assert "resume=auto goes on" in str(stop.value)
    assert len(str(stop.value)) < 700
    assert steps_saved(folder) == 3
    assert record(folder)["status"] == "failed"
    assert start(folder, checkpoint=EVERY_STEP) == 0
    assert rows(folder) == rows(uninterrupted)


def test_a_save_needs_no_temporary_folder(
    start: Start, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As TMPDIR would set it, which has no effect once the process has looked for it.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "cannot be written"))
    assert start(tmp_path / "run", checkpoint=EVERY_STEP) == 0
    assert rows(tmp_path / "run") == rows(uninterrupted)


def test_the_file_of_the_model_that_cannot_be_written_is_named(stopped: Path, start: Start) -> None:
    description = stopped / "model" / "tokenizer_description.json"
    description.unlink()
    description.mkdir()
    with pytest.raises(UserError, match=r"^the state of step 5 \(tokenizer_description\.json\): cannot be"):
        start(stopped, checkpoint=EVERY_STEP)


def test_damaged_weights_of_a_finished_run_are_written_anew_as_their_error_says(
    start: Start, uninterrupted: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    weights = folder / "model" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4] + bytes([whole[-4] ^ 1]) + whole[-3:])
    with pytest.raises(
        UserError, match=r"model\.safetensors: damaged: .* once its evaluation/length\.json is"
    ):
        load(folder)
    (folder / "evaluation" / "length.json").unlink()
    assert start(folder, checkpoint=EVERY_STEP) == 0
    assert weights.read_bytes() == whole


@pytest.mark.parametrize("number", UNWRITABLE)
def test_a_run_may_go_on_while_it_cannot_write(
    number: int,
    start: Start,
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "run"
    failed = unwritable_from(monkeypatch, 2, number, 3)
    assert start(folder, checkpoint={**EVERY_STEP, "on_failed_write": "go_on"}) == 0
    assert len(failed) == 3
    screen = capsys.readouterr().err
    assert screen.count("the run goes on") == 3
    assert os.strerror(number) in screen
    assert rows(folder) == rows(uninterrupted)
    weights = "model/model.safetensors"
    assert (folder / weights).read_bytes() == (uninterrupted / weights).read_bytes()


def test_a_best_state_that_could_not_be_saved_is_not_counted_as_the_best(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, failed = checkpoint_io.AtomicCheckpointIO._save, []

    def failing(self: checkpoint_io.AtomicCheckpointIO, checkpoint: dict[str, Any], target: Path) -> None:
        if target.name == "best.ckpt" and not failed:
            failed.append(checkpoint["windowlm"]["validation_bits_per_byte"])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        save(self, checkpoint, target)

    monkeypatch.setattr(checkpoint_io.AtomicCheckpointIO, "_save", failing)
    end, validated = LanguageModelModule.on_validation_epoch_end, []

    def worse_and_worse(self: LanguageModelModule) -> None:
        end(self)
        self.validation_bits_per_byte = 8.0 + len(validated)
        validated.append(self.validation_bits_per_byte)

    monkeypatch.setattr(LanguageModelModule, "on_validation_epoch_end", worse_and_worse)
    folder = tmp_path / "run"
    assert start(folder, checkpoint={**EVERY_STEP, "on_failed_write": "go_on"}) == 0
    assert failed == [8.0]
    for name in ("best", "last"):
        saved = checkpoint_io.AtomicCheckpointIO().load_checkpoint(folder / "checkpoints" / f"{name}.ckpt")
        assert saved["callbacks"]["CheckpointWriter"] == {"best_bits_per_byte": 9.0}


def test_the_end_of_a_run_must_be_written(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unwritable_from(monkeypatch, 6, errno.ENOSPC, 1000)
    with pytest.raises(UserError, match="No space left on device"):
        start(tmp_path / "run", checkpoint={"every_n_steps": 1, "on_failed_write": "go_on"})
    assert steps_saved(tmp_path / "run") == 5


def test_metrics_that_cannot_be_written_keep_every_process_out_of_the_save(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[OSError] = []

    def leader_alone(work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as error:  # as the others would get it
            told.append(error)
            raise

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    module = SimpleNamespace(
        require_finite_weights=lambda: None,
        processes=SimpleNamespace(leader_alone=leader_alone),
        spent=lambda: SimpleNamespace(steps=3),
        finished=False,
    )
    trainer = SimpleNamespace(should_stop=False, save_checkpoint=lambda _: pytest.fail("others wait in it"))
    writer = CheckpointWriter(
        tmp_path, 1, lambda _: False, write_metrics=full, save_model=full,
        failed_writes=FailedWrites("go_on", tmp_path),
    )  # fmt: skip
    writer._save(trainer, module, "last.ckpt")  # type: ignore[arg-type]
    assert len(told) == 1
    assert "the state of step 3" in capsys.readouterr().err


def test_a_step_that_is_not_finite_makes_no_vanished_folder_anew(tmp_path: Path) -> None:
    watch = NonFiniteWatch(tmp_path / "gone" / "replay", most=0)
    module = SimpleNamespace(
        processes=ALONE, spent=lambda: SimpleNamespace(steps=1), accumulate_batches=1, seed=0,
        loss_scaling=False,
        model=SimpleNamespace(vocabulary_size=2, state_dict=dict),
    )  # fmt: skip
    watch._of = SimpleNamespace(optimizers=[SimpleNamespace(state_dict=dict)]), module  # type: ignore[assignment]
    step = SimpleNamespace(number=1, learning_rate=0.1, window_limit=None, batches=[])
    assert "gone is gone" in watch._save(step, needed=True)  # type: ignore[arg-type]
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize("policy", ["stop", "go_on"])
def test_a_folder_that_vanishes_is_said_and_not_made_anew(
    policy: str, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    training_step = LanguageModelModule.training_step

    def vanishing(self: LanguageModelModule, *arguments: Any) -> Any:
        if self.batches_trained == 3:
            shutil.rmtree(folder)
        return training_step(self, *arguments)

    monkeypatch.setattr(LanguageModelModule, "training_step", vanishing)
    with pytest.raises(UserError, match=r"run's folder .* is gone"):
        start(folder, checkpoint={**EVERY_STEP, "on_failed_write": policy})
    assert not folder.exists()


def test_a_folder_that_is_moved_away_ends_the_command_with_one_message(
    small_run: tuple[str, ...], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    words = (*small_run, "logger=none", f"run_dir={folder}", "checkpoint.every_n_steps=20")
    with ThreadPoolExecutor() as pool:
        running = pool.submit(run_script, "train.py", *words, "trainer.max_steps=100000", cwd=tmp_path)
        while not (folder / "checkpoints" / "last.ckpt").exists():
            assert not running.done(), running.result().stderr
            time.sleep(0.05)
        folder.rename(tmp_path / "elsewhere")
        done = running.result()
    assert done.returncode == 2
    (message,) = done.stderr.splitlines()
    assert "the run's folder run is gone" in message
    # As another process of the run says.
    assert run._what_is_saved(folder) == f"the run's folder {folder} is gone"
    assert not folder.exists()
    assert damage(tmp_path / "elsewhere" / "checkpoints" / "last.ckpt") is None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("file systems can be mounted by root alone")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_stops_the_run_and_room_lets_it_go_on(
    small_disk: Path, start: Start, uninterrupted: Path
) -> None:
    folder = small_disk / "run"
    subprocess.run(["mount", "-o", "remount,size=400k", str(small_disk)], check=True)
    (small_disk / "ballast").write_bytes(bytes(150_000))
    with pytest.raises(UserError, match="No space left on device"):
        start(folder, checkpoint=EVERY_STEP)
    states = RunFolder(folder).saved_states()
    assert states
    assert all(damage(path) is None for path in states)
    assert not list(folder.rglob(".*.partial-*"))
    (small_disk / "ballast").unlink()
    subprocess.run(["mount", "-o", "remount,size=10m", str(small_disk)], check=True)
    assert start(folder, checkpoint=EVERY_STEP) == 0
    assert rows(folder) == rows(uninterrupted)


def test_a_disk_that_was_full_for_a_while_leaves_all_of_the_run_in_wandb(
    small_disk: Path, start: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    ballast = small_disk / "ballast"
    training_step = LanguageModelModule.training_step

    def filling(self: LanguageModelModule, *arguments: Any) -> Any:
        if self.batches_trained == 2:
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        elif self.batches_trained == 70:
            time.sleep(1)  # W&B writes at leisure
            ballast.unlink()
        return training_step(self, *arguments)

    monkeypatch.setattr(LanguageModelModule, "training_step", filling)
    settings = {
        "trainer": {"max_steps": 75, "log_every_n_steps": 1, "validate_every_n_steps": 75},
        "logger": {"kind": "wandb"},
    }
    assert (
        start(small_disk / "run", checkpoint={"every_n_steps": 100, "on_failed_write": "go_on"}, **settings)
        == 0
    )
    screen = capsys.readouterr().err
    assert "No space left on device; the run goes on" in screen
    assert "warning: W&B's file is rebuilt" in screen
    assert record(small_disk / "run")["status"] == "finished"
    assert history_differences(small_disk / "run") == []


def test_a_folder_mounted_read_only_stops_the_run(
    small_disk: Path, start: Start, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = small_disk / "run"
    subprocess.run(["mount", "-o", "remount,size=10m", str(small_disk)], check=True)
    training_step = LanguageModelModule.training_step

    def freezing(self: LanguageModelModule, *arguments: Any) -> Any:
        if self.batches_trained == 3:
            subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
        return training_step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(LanguageModelModule, "training_step", freezing)
        # The kernel refuses to do so on request while a file is open for writing; a failing disk asks nobody.
        patch.setattr(RunLock, "take", lambda self: None)
        with pytest.raises(UserError, match="Read-only file system"):
            start(folder, checkpoint=EVERY_STEP)
    with pytest.raises(UserError, match="Read-only file system"):
        start(folder, checkpoint=EVERY_STEP)
    assert steps_saved(folder) == 3
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert start(folder, checkpoint=EVERY_STEP) == 0
    assert rows(folder) == rows(uninterrupted)


@pytest.mark.parametrize("killed_at", ["run.json", "config.json", "metrics.jsonl"])
def test_a_run_killed_while_it_began_begins_again(
    killed_at: str, start: Start, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    replace = Path.replace

    def ending(self: Path, target: Path) -> Path:
        if target.name == killed_at:
            shutil.copy(self, self.with_name(f"{self.name}1"))  # what a kill leaves
            raise KeyboardInterrupt
        return replace(self, target)

    def writing_half(self: metrics_log.MetricsLog, row: dict[str, Any]) -> None:
        self.path.write_text('{"step": ')
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", ending)
        patch.setattr(run.TrainingRun, "_end", lambda *_: None)
        if killed_at == "metrics.jsonl":
            patch.setattr(metrics_log.MetricsLog, "append", writing_half)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            start(folder, checkpoint=EVERY_STEP)
    assert start(folder, checkpoint=EVERY_STEP) == 0
    assert rows(folder) == rows(uninterrupted)
    assert not list(folder.rglob(".*.partial-*"))


def test_a_run_from_the_state_of_another_that_is_killed_before_it_saves_starts_from_it_again(
    start: Start, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longer = {"checkpoint": {"every_n_steps": 100}, "trainer": {"max_steps": 9}}
    assert start(tmp_path / "whole", resume=str(uninterrupted), **longer) == 0
    folder = tmp_path / "run"
    monkeypatch.chdir(uninterrupted.parent)
    training_step = LanguageModelModule.training_step

    def ending(self: LanguageModelModule, *arguments: Any) -> Any:
        if self.batches_trained == 7:
            raise KeyboardInterrupt
        return training_step(self, *arguments)

    for resume in (uninterrupted.name, "auto"):
        with monkeypatch.context() as patch:
            patch.setattr(LanguageModelModule, "training_step", ending)
            with pytest.raises((KeyboardInterrupt, SystemExit)):
                start(folder, resume=resume, **longer)
        assert not RunFolder(folder).saved_states()
        monkeypatch.chdir(tmp_path)
    held = {path: path.read_bytes() for path in uninterrupted.rglob("*") if path.is_file()}
    assert start(folder, resume="auto", **longer) == 0
    assert rows(folder) == rows(tmp_path / "whole")
    weights = "model/model.safetensors"
    assert (folder / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
    assert {path: path.read_bytes() for path in uninterrupted.rglob("*") if path.is_file()} == held


def test_a_run_whose_origin_is_gone_is_not_begun_from_nothing(
    start: Start, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin, folder = tmp_path / "origin", tmp_path / "run"
    shutil.copytree(uninterrupted, origin)
    longer = {"trainer": {"max_steps": 9}}
    with monkeypatch.context() as patch:
        patch.setattr(LanguageModelModule, "training_step", lambda *_: pytest.fail("stop"))
        with pytest.raises(pytest.fail.Exception):
            start(folder, resume=str(origin), **longer)
    shutil.rmtree(origin)
    with pytest.raises(UserError, match="holds no run with a checkpoint"):
        start(folder, resume="auto", **longer)
