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
    "run": {"dir": "a"},
    "sweep": {"dir": "a", "subdir": "0"},
    "launcher": {"_target_": "hydra_plugins.x", "timeout_min": 3, "setup": None},
    "sweeper": {"_target_": "hydra.x", "params": None},
    "callbacks": {},
    "overrides": {"task": []},
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
        ({"launcher": {**USUAL["launcher"], "timeout_min": 9, "setup": ["module load x"]}}, None),
        ({"run": {"dir": "b"}, "sweep": {"dir": "b", "subdir": "0"}}, None),
        ({"sweeper": {"_target_": "hydra.x", "params": {"seed": "1,2"}}}, None),
        ({"overrides": {"task": ["seed=1"]}}, None),
        ({"launcher": {**USUAL["launcher"], "_target_": "os.getcwd"}}, "hydra.launcher._target_"),
        (
            {"launcher": {**USUAL["launcher"], "setup": [{"_target_": "x"}]}},
            "hydra.launcher.setup.0._target_",
        ),
        ({"launcher": 3}, "hydra.launcher"),
        ({"sweep": {"dir": "a", "subdir": "../1"}}, "hydra.sweep.subdir"),
        ({"sweeper": {"_target_": "other", "params": None}}, "hydra.sweeper._target_"),
        ({"callbacks": {"x": {"_target_": "os.getcwd"}}}, "hydra.callbacks.x"),
    ],
)
def test_changes_are_places_sweeps_and_what_the_launcher_is_told(
    changes: dict[str, Any], named: str | None
) -> None:
    if named is None:
        refuse_changes_of_hydra({**USUAL, **changes}, USUAL)
        return
    with pytest.raises(ConfigError) as caught:
        refuse_changes_of_hydra({**USUAL, **changes}, USUAL)
    assert caught.value.key == named


def test_what_an_option_of_the_launcher_names_is_refused_though_it_is_no_change() -> None:
    option = {**USUAL, "launcher": {"_target_": "hydra_plugins.x", "setup": {"_target_": "os.getcwd"}}}
    with pytest.raises(ConfigError, match=r"^hydra\.launcher\.setup\._target_: cannot be set"):
        refuse_changes_of_hydra(option, option)


@pytest.mark.parametrize(
    "word",
    ["hydra.sweep.dir=x", "hydra.run.dir=x", "hydra/launcher=jobs_local", "+hydra.launcher.x=3", "hydrant=3"],
)
def test_words_that_change_no_more_pass(word: str) -> None:
    refuse_words_for_hydra([word])
