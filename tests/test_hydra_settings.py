"""Settings of Hydra's own that name code are refused, on the command line and in files from others."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import PROJECT
from windowlm.command_line import Command, Invocation, main
from windowlm.config import ConfigError, TrainConfig
from windowlm.hydra_settings import refuse_changes_of_hydra, refuse_words_for_hydra

MADE = "{_target_: pathlib.Path.write_text, self: {_target_: pathlib.Path, _args_: [made]}, data: x}"
USUAL: dict[str, Any] = {
    "callbacks": {},
    "hydra_logging": {"handlers": {"a": {"class": "logging.StreamHandler", "stream": "ext://sys.stdout"}}},
    "job": {"chdir": False, "env_set": {}, "env_copy": [], "name": "app"},
    "job_logging": {"version": 1, "root": None, "disable_existing_loggers": False},
    "launcher": {"_target_": "hydra_plugins.x", "timeout_min": 3, "setup": None},
    "mode": None,
    "output_subdir": ".hydra",
    "run": {"dir": "a"},
    "searchpath": [],
    "sweep": {"dir": "a", "subdir": "${hydra.job.num}"},
    "sweeper": {"_target_": "hydra._internal.core_plugins.basic_sweeper.BasicSweeper", "params": None},
    "verbose": False,
}


@pytest.mark.parametrize(
    "settings",
    [
        f"callbacks: {{x: {MADE}}}",
        "job_logging: {version: 1, handlers: {h: {(): pathlib.Path.touch, self: made}}}",
        "sweeper: {_target_: os.getcwd}",
        "launcher: {_target_: os.getcwd}",
        "job: {env_set: {LD_PRELOAD: made}}",
        "mode: MULTIRUN",
        "searchpath: [pkg://other]",
    ],
)
def test_a_file_that_was_handed_on_has_nothing_made(
    settings: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    conf = shutil.copytree(PROJECT / "conf", tmp_path / "conf")
    (conf / "experiment/handed.yaml").write_text(f"# @package _global_\nhydra:\n  {settings}\n")
    calls: list[TrainConfig] = []

    def task(config: TrainConfig, invocation: Invocation) -> int:
        calls.append(config)
        return 0

    command = Command(name="train", config_type=TrainConfig, task=task, fixes_run_dir=True)
    assert main(command, PROJECT / "train.py", conf, ["experiment=handed"]) == 2
    assert not calls
    assert [path.name for path in tmp_path.iterdir()] == ["conf"]
    key = settings.partition(":")[0]
    assert f"hydra.{key}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, None),
        ({"launcher": {**USUAL["launcher"], "timeout_min": 9, "setup": ["module load x"]}}, None),
        ({"run": {"dir": "b"}, "sweep": {**USUAL["sweep"], "dir": "b"}}, None),
        ({"sweeper": {**USUAL["sweeper"], "params": {"seed": "1,2"}}}, None),
        ({"launcher": {**USUAL["launcher"], "setup": [{"_target_": "x"}]}}, "launcher.setup.0._target_"),
        ({"launcher": 3}, "launcher"),
        ({"launcher": {"_target_": "os.getcwd"}}, "launcher._target_"),
        ({"launcher": {}}, "launcher._target_"),
        ({"sweep": {"dir": "a", "subdir": "../1"}}, "sweep.subdir"),
        ({"sweeper": {"_target_": "other", "params": None}}, "sweeper._target_"),
        ({"sweeper": None}, "sweeper._target_"),
        ({"callbacks": {"x": {"_target_": "os.getcwd"}}}, "callbacks"),
        ({"verbose": 3}, "verbose"),
        ({"verbose": 0}, "verbose"),
        ({"hydra_logging": {"handlers": {"a": {"()": "os.getcwd"}}}}, "hydra_logging.handlers.a.()"),
        ({"hydra_logging": {"handlers": {"a": {"class": "x.Y"}}}}, "hydra_logging.handlers.a.class"),
        ({"hydra_logging": {"root": {"level": "ext://os.environ"}}}, "hydra_logging.root.level"),
        ({"help": {"x": {"_target_": "os.getcwd"}}}, "help.x._target_"),
    ],
)
def test_changes_are_places_sweeps_and_what_the_launcher_is_told(
    changes: dict[str, Any], named: str | None
) -> None:
    if named is None:
        refuse_changes_of_hydra({**USUAL, **changes})
        return
    with pytest.raises(ConfigError) as caught:
        refuse_changes_of_hydra({**USUAL, **changes})
    assert caught.value.key == f"hydra.{named}"


@pytest.mark.parametrize(
    "word",
    ["hydra.sweep.dir=x", "hydra.run.dir=x", "hydra/launcher=jobs_local", "+hydra.launcher.x=3", "hydrant=3"],
)
def test_words_that_change_no_more_pass(word: str) -> None:
    refuse_words_for_hydra([word])
