"""Steps whose numbers are not finite, injected into small runs."""

import copy
import itertools
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import PROJECT
from tests.training.runs import begin, record, rows
from windowlm.config import ConfigError
from windowlm.errors import exit_status
from windowlm.training.checkpoint_io import AtomicCheckpointIO
from windowlm.training.lightning_module import LanguageModelModule
from windowlm.training.non_finite import NonFiniteError
from windowlm.training.same_run import differences

Start = Callable[..., int]


@pytest.fixture(scope="module")
def place(documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("non finite")
    shutil.copytree(documents, folder / "texts")
    return folder


@pytest.fixture
def start(place: Path) -> Start:
    return lambda folder, **changes: begin(folder, place / "texts", place / "cache", **changes)


def make_not_finite(
    monkeypatch: pytest.MonkeyPatch, steps: set[int], where: str, accumulate: int = 1
) -> None:
    """Spoil the loss, or the gradient alone, of these steps, counted from 1."""
    training_step = LanguageModelModule.training_step

    def spoiled(self: LanguageModelModule, *arguments: Any) -> torch.Tensor:
        wrong = self.batches_trained // accumulate + 1 in steps
        loss = training_step(self, *arguments)
        if not wrong or (self.batches_trained - 1) % accumulate:
            return loss
        if where == "loss":
            self._step_losses[-1].fill_(torch.inf)
            return loss * torch.nan
        loss.register_hook(lambda gradient: gradient * torch.inf)
        return loss

    monkeypatch.setattr(LanguageModelModule, "training_step", spoiled)


def replay(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Status of the script, in this process."""
    monkeypatch.setattr(sys, "argv", ["replay_batch.py", *arguments])
    main = runpy.run_path(str(PROJECT / "scripts" / "replay_batch.py"))["main"]
    return exit_status(main)


def state_of(folder: Path) -> dict[str, Any]:
    return AtomicCheckpointIO().load_checkpoint(folder / "checkpoints" / "last.ckpt")


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


CASES = [("adamw", "32-true"), ("muon", "32-true"), ("adamw", "bf16-true"), ("muon", "bf16-true")]


@pytest.mark.parametrize(
    ("where", "kind", "precision"), [("loss", "adamw", "32-true"), ("gradient", "muon", "bf16-true")]
)
def test_a_step_that_is_not_finite_ends_the_run_with_the_state_before_it(
    where: str, kind: str, precision: str, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    settings = {"optimizer": {"kind": kind}, "precision": precision, "checkpoint": {"every_n_steps": 1}}
    with monkeypatch.context() as patch:
        make_not_finite(patch, {4}, where)
        with pytest.raises(NonFiniteError, match=r"step 4: .*python scripts/replay_batch\.py .*step_4\.ckpt"):
            start(folder, **settings)
    assert record(folder)["status"] == "failed"
    replay = AtomicCheckpointIO().load_checkpoint(folder / "replay" / "step_4.ckpt")
    assert (replay["step"], replay["first_batch"], replay["later_steps"]) == (4, 3, 0)
    before = state_of(folder)
    assert before["global_step"] == 3
    for name, weight in replay["model"].items():
        assert torch.equal(weight, before["state_dict"][f"model.{name}"])
    # The rate alone is that of the step.
    for group in (*replay["optimizer"]["param_groups"], *before["optimizer_states"][0]["param_groups"]):
        del group["lr"]
    assert equal(replay["optimizer"], before["optimizer_states"][0])
    # Where nothing spoils it the run goes on and ends as if nothing had been.
    assert start(folder, **settings) == 0
    assert start(tmp_path / "whole", **settings) == 0
    assert differences(folder, tmp_path / "whole") == []


@pytest.mark.parametrize(
    ("where", "kind", "precision"), [("loss", "adamw", "32-true"), *(("gradient", *case) for case in CASES)]
)
def test_a_skipped_step_changes_neither_weights_nor_optimizer(
    where: str,
    kind: str,
    precision: str,
    start: Start,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "run"
    states: list[Any] = []
    step = LanguageModelModule.optimizer_step

    def recording(self: LanguageModelModule, *arguments: Any, **options: Any) -> None:
        step(self, *arguments, **options)
        state = self.trainer.optimizers[0].state_dict()["state"]
        states.append(copy.deepcopy([dict(self.model.state_dict()), state]))

    monkeypatch.setattr(LanguageModelModule, "optimizer_step", recording)
    make_not_finite(monkeypatch, {3, 5}, where, accumulate=2)
    trainer = {"max_skipped_steps": 2, "accumulate_batches": 2, "max_steps": 6}
    assert start(folder, optimizer={"kind": kind}, precision=precision, trainer=trainer) == 0
    assert len(states) == 6
    assert [equal(one, other) for one, other in itertools.pairwise(states)] == [
        False, True, False, True, False,
    ]  # fmt: skip
    screen = capsys.readouterr().err
    assert "step 3: the loss or its gradient is not finite; left out, 1 of at most 2" in screen
    assert "step 5: the loss or its gradient is not finite; left out, 2 of at most 2" in screen
    logged = [row for row in rows(folder) if "train_loss" in row]
    assert [row["skipped_steps"] for row in logged] == [1, 2]
    assert all(row["train_loss"] is not None for row in logged)


def test_one_more_than_may_be_skipped_ends_the_run_and_the_count_survives_a_resume(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        make_not_finite(patch, {2, 4}, "gradient")
        with pytest.raises(NonFiniteError, match=r"step 4: .*trainer\.max_skipped_steps=1"):
            start(folder, trainer={"max_skipped_steps": 1})
    assert state_of(folder)["windowlm"]["skipped_steps"] == 1
    with monkeypatch.context() as patch:
        make_not_finite(patch, {5}, "gradient")
        with pytest.raises(NonFiniteError, match="step 5"):
            start(folder, trainer={"max_skipped_steps": 1})
    with monkeypatch.context() as patch:
        make_not_finite(patch, {5}, "gradient")
        assert start(folder, trainer={"max_skipped_steps": 2}) == 0
    # A state that has left out more than are allowed would leave out all that follow.
    for name, settings in ((folder, {}), (tmp_path / "new", {"resume": str(folder)})):
        with pytest.raises(ConfigError, match=r"max_skipped_steps=1: the state of .* has left out 2 steps"):
            start(name, trainer={"max_skipped_steps": 1, "max_steps": 9}, **settings)
    assert start(folder, trainer={"max_skipped_steps": 2, "max_steps": 9}) == 0


@pytest.mark.parametrize(
    ("precision", "options", "limit"),
    [("32-true", (), None), ("bf16-true", ("--precision", "64-true"), None), ("32-true", (), 4)],
)
def test_a_step_is_replayed(
    precision: str,
    options: tuple[str, ...],
    limit: int | None,
    start: Start,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "run"
    saved = folder / "replay" / "step_3.ckpt"
    losses: list[float] = []
    training_step = LanguageModelModule.training_step

    def recording(self: LanguageModelModule, *arguments: Any) -> torch.Tensor:
        loss = training_step(self, *arguments)
        losses.append(float(self._step_losses[-1] / self._step_targets[-1]))
        return loss

    monkeypatch.setattr(LanguageModelModule, "training_step", recording)
    make_not_finite(monkeypatch, {3}, "gradient")
    with pytest.raises(NonFiniteError):
        start(
            folder,
            precision=precision,
            trainer={
                "window_warmup": limit,
                "window_warmup_fraction": 0.6,
                "further_targets": 2,
                "further_targets_fraction": 1.0,
            },
        )
    content = AtomicCheckpointIO().load_checkpoint(saved)
    assert content["window_limit"] == limit
    assert "further_targets_KBT" in content["batches"][0]
    capsys.readouterr()
    assert replay(monkeypatch, str(saved), *options) == 0
    screen = capsys.readouterr().out
    assert "weights       finite" in screen
    assert "first output  all finite" in screen
    if not options:
        assert f"batch 2       loss {losses[2]:.6g}, 0 of " in screen


def test_a_replay_names_what_is_not_finite(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    training_step = LanguageModelModule.training_step

    def spoiled(self: LanguageModelModule, *arguments: Any) -> torch.Tensor:
        if self.batches_trained == 2:
            with torch.no_grad():
                self.model.final_norm.weight.fill_(torch.nan)
        return training_step(self, *arguments)

    monkeypatch.setattr(LanguageModelModule, "training_step", spoiled)
    with pytest.raises(NonFiniteError):
        start(folder)
    assert replay(monkeypatch, str(folder / "replay" / "step_3.ckpt")) == 0
    screen = capsys.readouterr().out
    assert "weights       not finite: final_norm.weight" in screen
    assert "first output  final_norm is the first that is not finite" in screen
    assert replay(monkeypatch, str(folder / "run.json")) == 2
    assert "run.json: damaged" in capsys.readouterr().err
