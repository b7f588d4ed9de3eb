"""Runs in this process that are stopped, fail or go on."""

import contextlib
import itertools
import json
import os
import shutil
import signal
import statistics
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from tests.training.runs import begin, record, rows, steps_saved
from windowlm.bundle import load
from windowlm.command_line import Invocation
from windowlm.config import ConfigError, TrainConfig
from windowlm.errors import UserError
from windowlm.evaluation.result_files import RESULT_NAME
from windowlm.training import run
from windowlm.training.lightning_module import LanguageModelModule
from windowlm.training.non_finite import NonFiniteError
from windowlm.training.offline_wandb import history_differences, read_offline_run
from windowlm.training.run_folder import RunFolder
from windowlm.training.signals import WATCHED, Signals

Start = Callable[..., int]


@pytest.fixture(scope="module")
def place(documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the texts and the cache of these runs."""
    folder = tmp_path_factory.mktemp("endings")
    shutil.copytree(documents, folder / "texts")
    return folder


@pytest.fixture
def start(place: Path, tmp_path: Path) -> Start:
    """Start a run in a folder of the name, or go on with it."""
    return lambda name, **changes: begin(tmp_path / name, place / "texts", place / "cache", **changes)


@pytest.fixture(scope="module")
def uninterrupted(place: Path) -> Path:
    """Folder of a run that nothing stopped."""
    assert begin(place / "uninterrupted", place / "texts", place / "cache") == 0
    return place / "uninterrupted"


@pytest.fixture
def before(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Do something once before a method of the module is called after so many trained batches."""

    def arrange(method: str, batches: int, act: Callable[[LanguageModelModule], object]) -> None:
        original = getattr(LanguageModelModule, method)
        pending = [act]

        def patched(self: LanguageModelModule, *arguments: Any) -> Any:
            if self.batches_trained == batches and pending:
                pending.pop()(self)
            return original(self, *arguments)

        monkeypatch.setattr(LanguageModelModule, method, patched)

    return arrange  # type: ignore[return-value]


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("method", "batches", "saved"),
    [
        ("training_step", 2, 3),  # saved at once, though no validation is due
        ("training_step", 3, 4),  # a validation is due at this very step, and takes place
        ("validation_step", 2, 2),  # in a validation, which ends first
        ("on_save_checkpoint", 2, 3),  # while a checkpoint is written
    ],
)
def test_a_signal_loses_nothing(
    number: signal.Signals,
    method: str,
    batches: int,
    saved: int,
    start: Start,
    before: Callable[..., None],
    uninterrupted: Path,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    before(method, batches, lambda _: send(number))
    assert start("run") == 75
    assert record(folder)["status"] == "stopped"
    assert steps_saved(folder) == saved
    assert not (folder / "evaluation").exists()
    assert start("run") == 0
    assert rows(folder) == rows(uninterrupted)


def test_lightning_takes_no_signal_before_the_first_step(
    start: Start, before: Callable[..., None], tmp_path: Path
) -> None:
    held: list[Any] = []
    before("configure_optimizers", 0, lambda _: held.extend(map(signal.getsignal, WATCHED)))
    before("training_step", 0, lambda _: send(signal.SIGTERM))
    assert start("run") == 75
    # With its handler of SIGTERM a process would wait for others that are elsewhere.
    assert {handler.__func__ for handler in held} == {Signals._receive}


SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NAME": "train",
    "SLURM_NTASKS": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NODELIST": "node1",
}


@pytest.mark.parametrize(
    ("array", "fails", "asked", "number"),
    [
        ({}, "", "4711", signal.SIGUSR1),
        ({"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}, "exit 1", "12_3", signal.SIGUSR2),
    ],
)
def test_a_job_of_slurm_saves_after_its_step_and_goes_back_to_the_queue(
    array: dict[str, str],
    fails: str,
    asked: str,
    number: int,
    start: Start,
    before: Callable[..., None],
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, calls = tmp_path / "run", tmp_path / "calls"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {calls}\n{fails}\n')
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hpc_ckpt_1.ckpt").write_bytes(b"of another program in this folder")
    for name, value in {**SLURM, **array}.items():
        monkeypatch.setenv(name, value)
    before("training_step", 2, lambda _: send(number))
    assert start("run") == 75
    assert steps_saved(folder) == 3
    assert calls.read_text() == f"requeue {asked}\n"
    assert ("back in SLURM's queue" in capsys.readouterr().err) is not bool(fails)
    assert start("run") == 0
    assert rows(folder) == rows(uninterrupted)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "calls", "hpc_ckpt_1.ckpt", "run"]


@pytest.mark.parametrize(("leads", "asked"), [(True, 1), (False, 0)])
def test_of_several_processes_one_gives_the_job_back(
    leads: bool, asked: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[None] = []
    place = SimpleNamespace(size=2, leads=leads, wait=lambda: None)

    class Stopped:
        def __init__(self, config: object, invocation: object, signals: Signals, processes: object) -> None:
            signals.requeues = True

        def execute(self) -> int:
            return 75

    monkeypatch.setattr(run.Processes, "join", lambda: place)
    monkeypatch.setattr(run, "TrainingRun", Stopped)
    monkeypatch.setattr(run, "requeue", lambda: calls.append(None))
    invocation = Invocation(output_dir=tmp_path, sweep_dir=None, command="python train.py")
    assert run.train(TrainConfig(run_dir="run"), invocation) == 75
    assert len(calls) == asked


def test_a_stop_is_saved_without_a_validation(
    start: Start, before: Callable[..., None], tmp_path: Path
) -> None:
    before("training_step", 2, lambda _: send(signal.SIGTERM))
    assert start("run") == 75
    assert [row["step"] for row in rows(tmp_path / "run") if "validation_loss" in row] == [2]


def test_a_save_waits_for_a_validation_that_is_due_at_a_step_and_not_for_one_due_at_a_time(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, int]] = []
    save, validate = pl.Trainer.save_checkpoint, LanguageModelModule.on_validation_epoch_start

    def saving(self: pl.Trainer, path: Path, *arguments: Any) -> None:
        if path.name == "last.ckpt":
            events.append(("save", self.global_step))
        save(self, path, *arguments)

    def validating(self: LanguageModelModule) -> None:
        events.append(("validation", self.spent().steps))
        validate(self)

    monkeypatch.setattr(pl.Trainer, "save_checkpoint", saving)
    monkeypatch.setattr(LanguageModelModule, "on_validation_epoch_start", validating)
    every_step = {"every_n_steps": 1}
    assert start("steps", checkpoint=every_step, trainer={"max_steps": 3}) == 0
    assert events == [("save", 1), ("validation", 2), ("save", 2), ("validation", 3), ("save", 3)]

    events.clear()
    monkeypatch.setattr(run.TrainingRun, "_validation_interval", lambda *_: timedelta(microseconds=1))
    seconds = {"max_steps": None, "max_seconds": 2.0, "validate_every_n_steps": None}
    assert start("seconds", checkpoint=every_step, trainer=seconds) == 0
    assert events[:3] == [("save", 1), ("validation", 1), ("save", 1)]


def test_a_run_that_stops_in_its_evaluation_is_evaluated_and_not_trained_on(
    start: Start,
    uninterrupted: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(run, "evaluate_model", lambda *_: send(signal.SIGINT))
        assert start("run") == 75
    weights = (folder / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(folder / "model")
    monkeypatch.setattr(pl.Trainer, "fit", lambda *_, **__: pytest.fail("it trained on"))
    assert start("run") == 0
    assert record(folder)["status"] == "finished"
    assert rows(folder) == rows(uninterrupted)
    assert (folder / "model" / "model.safetensors").read_bytes() == weights
    for context in ("length.json", "length.csv"):
        assert (folder / "evaluation" / context).read_bytes() == (
            uninterrupted / "evaluation" / context
        ).read_bytes()


def test_a_finished_run_with_a_smaller_budget_has_nothing_to_do(
    start: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start("run") == 0
    monkeypatch.setattr(pl.Trainer, "fit", lambda *_, **__: pytest.fail("it trained on"))
    assert start("run", trainer={"max_steps": 4}) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_a_finished_run_that_kept_no_state_is_not_trained_anew(start: Start, tmp_path: Path) -> None:
    folder, checkpoint = tmp_path / "run", {"keep": False}
    assert start("run", checkpoint=checkpoint) == 0
    assert not (folder / "checkpoints").exists()
    assert RunFolder(folder).result == folder / "evaluation" / RESULT_NAME
    held = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert start("run", checkpoint=checkpoint) == 0
    with pytest.raises(ConfigError, match="none of its checkpoints is left"):
        start("run", checkpoint=checkpoint, trainer={"max_steps": 8})
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == held
    shutil.rmtree(folder / "evaluation")
    with pytest.raises(ConfigError, match=r"model\.init_from=.*run to start one from its last weights"):
        start("run", checkpoint=checkpoint)


def test_a_finished_run_whose_evaluation_is_gone_is_evaluated(start: Start, tmp_path: Path) -> None:
    result = tmp_path / "run" / "evaluation" / "length.json"
    assert start("run") == 0
    before = result.read_bytes()
    shutil.rmtree(result.parent)
    assert start("run") == 0
    assert result.read_bytes() == before


def test_a_screen_that_cannot_be_written_leaves_a_finished_run_finished(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: Any) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(run, "print_closing_screen", broken)
    with pytest.raises(BrokenPipeError):
        start("run")
    assert record(tmp_path / "run")["status"] == "finished"


def test_a_run_goes_on_where_nobody_reads_its_screen(
    start: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as screen:
        monkeypatch.setattr(sys, "stdout", screen)
        assert start("run") == 0
    assert capsys.readouterr().err == "warning: nobody reads standard output any more; the run goes on\n"
    assert record(tmp_path / "run")["status"] == "finished"


def test_a_full_screen_is_named(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/full").open("w") as screen:
        monkeypatch.setattr(sys, "stdout", screen)
        with pytest.raises(UserError, match="standard output: No space left on device; send it elsewhere"):
            start("run")


@pytest.mark.parametrize(
    ("key", "value", "before"),
    [
        ("data.sequence_length", 32, 64),
        ("data.batch_size", 4, 2),
        ("trainer.accumulate_batches", 2, 1),
        ("model.window", 4, 8),
    ],
)
def test_the_state_of_another_run_is_taken_only_with_the_batches_it_was_counted_in(
    start: Start, uninterrupted: Path, tmp_path: Path, key: str, value: int, before: int
) -> None:
    group, _, name = key.partition(".")
    with pytest.raises(ConfigError, match=f"{key}={value}: .* has {key}={before}") as refused:
        start("next", resume=str(uninterrupted), **{group: {name: value}})
    assert refused.value.correction == f"{key}={before}"
    assert not (tmp_path / "next").exists()


def test_a_run_goes_on_from_the_state_of_another_with_a_larger_budget(
    start: Start, uninterrupted: Path, tmp_path: Path
) -> None:
    assert start("next", resume=str(uninterrupted), trainer={"max_steps": 8}) == 0
    assert steps_saved(tmp_path / "next") == 8


def test_a_batch_that_is_left_open_has_the_rows_of_the_run_that_goes_on(
    start: Start, uninterrupted: Path, tmp_path: Path
) -> None:
    open_batch: dict[str, Any] = {"data": {"batch_size": None}, "trainer": {"max_steps": 8}}
    assert start("next", resume=str(uninterrupted), **open_batch) == 0
    assert json.loads((tmp_path / "next" / "config.json").read_text())["data"]["batch_size"] == 2
    assert start("next", resume="auto", **open_batch) == 0


@pytest.mark.parametrize("rows", [0, -2, True, 2.0, None])
def test_a_batch_is_not_taken_from_settings_that_are_damaged(
    start: Start, uninterrupted: Path, tmp_path: Path, rows: object
) -> None:
    shutil.copytree(uninterrupted, tmp_path / "damaged")
    path = tmp_path / "damaged" / "config.json"
    settings = json.loads(path.read_text())
    settings["data"]["batch_size"] = rows
    path.write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"config.json: data.batch_size=.* is no number of rows"):
        start("next", resume=str(tmp_path / "damaged"), data={"batch_size": None}, trainer={"max_steps": 8})


@pytest.mark.parametrize(
    ("budget", "spent", "larger"),
    [
        ({"max_steps": 6}, "6 of 6 steps", "trainer.max_steps=12"),
        ({"max_steps": None, "max_tokens": 500}, "768 of 500 tokens", "trainer.max_tokens=1536"),
    ],
)
def test_the_state_of_another_run_leaves_something_of_the_budget(
    start: Start, uninterrupted: Path, tmp_path: Path, budget: dict[str, Any], spent: str, larger: str
) -> None:
    with pytest.raises(ConfigError, match=f"{spent}; give a larger budget") as refused:
        start("next", resume=str(uninterrupted), trainer=budget)
    assert refused.value.correction == larger
    assert not (tmp_path / "next").exists()


@pytest.mark.parametrize(
    ("words", "resume", "warns"),
    [
        ("", "auto", True),
        ("run_dir=null", "auto", True),
        ("run_dir=run", "auto", False),
        ("'+run_dir=my run'", "auto", False),
        ("", None, False),
    ],
)
def test_resuming_without_a_folder_is_said_to_start_a_new_run(
    start: Start, capsys: pytest.CaptureFixture[str], words: str, resume: str | None, warns: bool
) -> None:
    assert start("run", plan=True, resume=resume, command=f"python train.py {words}") == 0
    told = capsys.readouterr().out
    assert ("resume=auto without run_dir starts a new run" in told) is warns
    # What is given anew after a kill has nothing to go on from where nothing was saved.
    assert ("no state is saved there, so this begins at step 1" in told) is (resume == "auto" and not warns)


def evaluation_that(act: Callable[[], None]) -> Callable[..., Any]:
    """The evaluation, which does something first."""
    evaluate = run.evaluate_model

    def acting(*arguments: Any) -> Any:
        act()
        return evaluate(*arguments)

    return acting


def swallowed() -> None:
    with contextlib.suppress(BaseException):
        send(signal.SIGINT)


def fails() -> None:
    swallowed()
    raise UserError("a worker is gone")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("method", "batches"), [("training_step", 1), ("training_step", 5), ("spent", 0)])
def test_a_signal_ends_the_sweep(
    number: signal.Signals, method: str, batches: int, start: Start, before: Callable[..., None]
) -> None:
    before(method, batches, lambda _: send(number))
    with pytest.raises(SystemExit) as left:
        start("0", sweep=True)
    assert left.value.code == 75


@pytest.mark.parametrize("act", [lambda: send(signal.SIGINT), swallowed, fails])
def test_a_signal_in_an_evaluation_ends_the_sweep_however_the_evaluation_takes_it(
    act: Callable[[], None], start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "evaluate_model", evaluation_that(act))
    with pytest.raises(SystemExit) as left:
        start("0", sweep=True)
    assert left.value.code == 75


def test_a_signal_before_a_run_begins_ends_the_sweep(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "choose_device", lambda *_: send(signal.SIGINT))
    with pytest.raises(SystemExit) as left:
        start("0", sweep=True)
    assert left.value.code == 75


def test_a_failure_without_a_signal_leaves_the_sweep_to_go_on(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise UserError("this run alone")

    monkeypatch.setattr(run, "evaluate_model", evaluation_that(fail))
    with pytest.raises(UserError, match="this run alone"):
        start("0", sweep=True)


def test_the_wall_clock_limit_counts_from_the_start_of_the_command(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(run, "COMMAND_STARTED", run.COMMAND_STARTED - 5000)
    assert start("run", trainer={"max_time": 4000.0}) == 75
    assert steps_saved(tmp_path / "run") == 1


def test_the_wall_clock_limit_ends_an_evaluation_between_two_parts(
    start: Start,
    before: Callable[..., None],
    uninterrupted: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, limit = tmp_path / "run", {"max_time": 4000.0}
    early, kept = run.COMMAND_STARTED - 5000, []
    before("training_step", 5, lambda _: monkeypatch.setattr(run, "COMMAND_STARTED", early))
    for _ in range(3):
        assert start("run", trainer=limit) == 75
        said = "stopped: trainer.max_time=4000 seconds reached; the state is saved, resume=auto goes on"
        assert said in capsys.readouterr().out
        assert record(folder)["status"] == "stopped"
        assert steps_saved(folder) == 6
        kept.append(len(list(folder.glob("evaluation/unfinished/*"))))
    assert kept == [0, 1, 2]
    with pytest.raises(SystemExit) as left:
        start("run", trainer=limit, sweep=True)
    assert left.value.code == 75
    assert start("run") == 0
    assert rows(folder) == rows(uninterrupted)
    for name in ("length.json", "length.csv"):
        assert (folder / "evaluation" / name).read_bytes() == (
            uninterrupted / "evaluation" / name
        ).read_bytes()


def test_other_documents_are_refused_by_name_before_anything_is_written(
    place: Path, before: Callable[..., None], tmp_path: Path
) -> None:
    texts, folder = Path(shutil.copytree(place / "texts", tmp_path / "texts")), tmp_path / "run"
    before("training_step", 2, lambda _: send(signal.SIGTERM))
    assert begin(folder, texts, place / "cache") == 75
    held = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (texts / "document 99.txt").write_text("one more document, which moves all others", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"source_identity [0-9a-f]+ there, [0-9a-f]+ here"):
        begin(folder, texts, place / "cache")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == held


def spoil(module: LanguageModelModule) -> None:
    with torch.no_grad():
        module.model.final_norm.weight.fill_(torch.inf)


def test_weights_that_are_not_finite_end_the_run_and_are_not_saved(
    start: Start, before: Callable[..., None], tmp_path: Path
) -> None:
    before("validation_step", 4, spoil)
    with pytest.raises(NonFiniteError, match=r"step 4: the weight final_norm\.weight"):
        start("run")
    assert steps_saved(tmp_path / "run") == 2
    assert record(tmp_path / "run")["status"] == "failed"


def test_a_loss_that_is_not_finite_ends_the_run_at_its_step(
    start: Start, before: Callable[..., None], tmp_path: Path
) -> None:
    before("training_step", 2, spoil)
    with pytest.raises(NonFiniteError, match="step 3: the loss or its gradient is not finite"):
        start("run")
    assert steps_saved(tmp_path / "run") == 2


def test_a_failed_run_gives_wandb_back_to_the_next(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")

    def fail(*_: Any) -> None:
        raise RuntimeError("no evaluation")

    logger = {"kind": "wandb"}
    with monkeypatch.context() as patch:
        patch.setattr(run, "evaluate_model", fail)
        with pytest.raises(RuntimeError, match="no evaluation"):
            start("failing", logger=logger)
    assert start("next", logger=logger) == 0
    read = {}
    for name in ("failing", "next"):
        (offline,) = (tmp_path / name / "wandb").glob("offline-run-*")
        read[name] = read_offline_run(offline)
        assert read[name]["id"] == record(tmp_path / name)["wandb_id"]
    assert record(tmp_path / "failing")["status"] == "failed"
    assert [read[name]["exit_code"] for name in ("failing", "next")] == [1, 0]
    assert read["failing"]["id"] != read["next"]["id"]


def test_a_run_is_recorded_as_finished_once_wandb_has_all_of_it(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")

    finish = run.WandbRun.finish

    def killed(self: run.WandbRun, exit_code: int) -> None:
        finish(self, 1)
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(run.WandbRun, "finish", killed)
        with pytest.raises(MemoryError):
            start("run", logger={"kind": "wandb"})
    assert record(tmp_path / "run")["status"] == "running"
    assert start("run", logger={"kind": "wandb"}) == 0
    assert record(tmp_path / "run")["status"] == "finished"
    assert history_differences(tmp_path / "run") == []


def test_a_run_that_a_signal_ends_while_wandb_does_is_stopped(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    finish = run.WandbRun.finish

    def told(self: run.WandbRun, exit_code: int) -> None:
        finish(self, exit_code)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(run.WandbRun, "finish", told)
        assert start("run", logger={"kind": "wandb"}) == 75
    assert record(tmp_path / "run")["status"] == "stopped"
    assert start("run", logger={"kind": "wandb"}) == 0
    assert history_differences(tmp_path / "run") == []


def test_a_run_that_goes_on_without_wandb_keeps_what_it_wrote_offline(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert start("run", logger={"kind": "wandb"}) == 0
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert start("run", logger={"kind": "wandb"}, trainer={"max_steps": 8}) == 0
    (offline,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert read_offline_run(offline)["exit_code"] == 0


def test_a_file_of_wandb_that_is_cut_off_is_rebuilt_before_the_run_counts_as_finished(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    finish, cuts = run.WandbRun.finish, [0.5, 0.9, 0.1]

    def cutting(self: run.WandbRun, exit_code: int) -> None:
        finish(self, exit_code)
        (file,) = (tmp_path / "run").glob("wandb/offline-run-*/*.wandb")
        if cuts:
            os.truncate(file, int(file.stat().st_size * cuts.pop(0)))
            file.parent.rename(f"{file.parent}-1")  # as W&B names the second one of a second

    monkeypatch.setattr(run.WandbRun, "finish", cutting)
    # Of the first start both files are cut off, of the second one.
    with pytest.raises(
        UserError, match=r"not be rebuilt: offline-run-.*cut off at byte.*resume=auto tries again"
    ):
        start("run", logger={"kind": "wandb"})
    assert record(tmp_path / "run")["status"] == "failed"
    assert start("run", logger={"kind": "wandb"}) == 0
    assert record(tmp_path / "run")["status"] == "finished"
    assert history_differences(tmp_path / "run") == []
    assert capsys.readouterr().err.count("warning: W&B's file is rebuilt from") == 2
    assert not cuts


def test_a_spike_behind_a_resume_is_judged_by_the_losses_before_it(
    start: Start, before: Callable[..., None], tmp_path: Path
) -> None:
    ten_steps = {"trainer": {"max_steps": 10, "log_every_n_steps": 1}}
    before("training_step", 8, lambda _: send(signal.SIGINT))
    assert start("run", **ten_steps) == 75
    assert steps_saved(tmp_path / "run") == 9
    before("training_step", 9, lambda module: module.model.embedding.weight.data.mul_(100))
    assert start("run", **ten_steps) == 0
    *losses, last = (row for row in rows(tmp_path / "run") if "train_loss" in row)
    assert last["step"] == 10
    assert last["loss_spike"] == last["train_loss"] - statistics.median(row["train_loss"] for row in losses)


def test_rows_and_the_name_of_their_file_are_synced_before_a_state_is_saved(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.readlink(f"/proc/self/fd/{number}")))
    # The first row is of the third step: the folder of checkpoints, whose making syncs names, is there.
    trainer = {"log_every_n_steps": 3, "validate_every_n_steps": 6}
    assert start("run", trainer=trainer, checkpoint={"every_n_steps": 1}) == 0
    metrics = str(tmp_path / "run" / "metrics.jsonl")
    states = [number for number, path in enumerate(synced) if ".ckpt.partial-" in path]
    assert len(states) == 7  # the best of the validation after the sixth step among them
    begun = synced.index(metrics)
    assert states[1] < begun < begun + 1 < states[2]
    assert synced[begun + 1] == str(tmp_path / "run")
    for before, state in itertools.pairwise(states[1:]):
        assert metrics in synced[before:state]


def test_a_killed_write_leaves_no_large_file_for_good(start: Start, tmp_path: Path) -> None:
    partial = tmp_path / "run" / "checkpoints" / ".last.ckpt.partial-123"
    partial.parent.mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text('{"status": "running"}')
    shutil.copy(__file__, partial)
    assert start("other") == 0
    shutil.copy(tmp_path / "other" / "config.json", tmp_path / "run" / "config.json")
    assert start("run") == 0
    assert sorted(path.name for path in partial.parent.iterdir()) == [
        "best.ckpt",
        "last.ckpt",
        "previous.ckpt",
    ]


SCHEDULES: dict[str, Any] = {
    "trainer": {
        "window_warmup": 2,
        "window_warmup_fraction": 0.8,
        "further_targets": 2,
        "further_targets_fraction": 1.0,
    },
    "optimizer": {
        "kind": "muon",
        "muon_momentum_warmup": 0.9,
        "embedding_lr": 1e-2,
        "embedding_weight_decay": 0.3,
        "vector_lr": 1e-3,
        "averaging": 0.5,
    },
}


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_run_with_every_schedule_goes_on_bit_by_bit(
    precision: str, start: Start, before: Callable[..., None], tmp_path: Path
) -> None:
    assert start("whole", precision=precision, **SCHEDULES) == 0
    before("training_step", 2, lambda _: send(signal.SIGINT))
    assert start("cut", precision=precision, **SCHEDULES) == 75
    assert steps_saved(tmp_path / "cut") == 3
    assert start("cut", precision=precision, **SCHEDULES) == 0
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    one, other = (load(tmp_path / name).model.state_dict() for name in ("cut", "whole"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    saved = torch.load(tmp_path / "cut" / "checkpoints" / "last.ckpt", weights_only=True)
    last = saved["state_dict"]["model.embedding.weight"]
    average = saved["windowlm"]["average"][0]
    assert not torch.equal(last.float(), average)
    assert torch.equal(one["embedding.weight"], average.to(last.dtype))


ROTARY = [{"base": 100.0}, None, {"scaling": {"kind": "yarn", "factor": 2.0, "original_length": 32}}]


def test_a_run_with_rotary_settings_of_each_layer_goes_on_and_is_read_with_them(
    start: Start, before: Callable[..., None], tmp_path: Path
) -> None:
    model = {"layers": 4, "rotary": ROTARY}
    assert start("whole", model=model) == 0
    before("training_step", 2, lambda _: send(signal.SIGINT))
    assert start("cut", model=model) == 75
    with pytest.raises(ConfigError, match=r"model\.rotary=.*100") as refused:
        start("cut", model={**model, "rotary": [{"base": 200.0}, None]})
    assert refused.value.key is not None
    assert refused.value.key.startswith("model.rotary")
    assert start("cut", model=model) == 0
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    one, other = (load(tmp_path / name).model for name in ("cut", "whole"))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    kinds = one.config.layer_rotaries()
    assert [kind and kind.base for kind in kinds] == [100.0, None, 10_000.0, 100.0]
    assert kinds[2] is not None
    assert kinds[2].scaling is not None
    assert kinds[2].scaling.kind == "yarn"


def test_a_finished_run_with_an_average_is_evaluated_again_alike(start: Start, tmp_path: Path) -> None:
    assert start("run", **SCHEDULES) == 0
    result = tmp_path / "run" / "evaluation" / "length.json"
    first = json.loads(result.read_text())
    shutil.rmtree(result.parent)
    assert start("run", **SCHEDULES) == 0
    assert json.loads(result.read_text())["rows"] == first["rows"]
