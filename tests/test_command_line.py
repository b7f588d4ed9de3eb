import shlex
import time
from pathlib import Path

import pytest

from tests.conftest import PROJECT, run_script
from windowlm.command_line import Command, Invocation, main
from windowlm.config import TrainConfig
from windowlm.training.run_folder import check_run_folder

CONF = PROJECT / "conf"


class Recorder:
    """A task that only notes how it was called."""

    def __init__(self) -> None:
        self.calls: list[tuple[TrainConfig, Invocation]] = []

    def __call__(self, config: TrainConfig, invocation: Invocation) -> int:
        self.calls.append((config, invocation))
        return 0


@pytest.fixture
def recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    monkeypatch.chdir(tmp_path)
    return Recorder()


def run(recorder: Recorder, *words: str) -> int:
    command = Command(
        name="train", config_type=TrainConfig, task=recorder, check=check_run_folder, fixes_run_dir=True
    )
    return main(command, PROJECT / "train.py", CONF, list(words))


def test_defaults_are_composed_and_the_run_gets_a_folder_of_its_own(recorder: Recorder) -> None:
    assert run(recorder) == 0
    ((config, invocation),) = recorder.calls
    assert config.model.window == 256
    assert invocation.output_dir.parts[0] == "runs"
    assert (invocation.output_dir / ".hydra" / "overrides.yaml").is_file()


@pytest.mark.parametrize(
    ("words", "expected", "correction"),
    [
        (["model.windw=64"], "there is no setting model.windw", "model.window=64"),
        (["window=64"], "there is no setting window", "model.window=64"),
        (["+model.extra=1"], "there is no setting model.extra", None),
        (["model=tinny"], "model=tinny: allowed is base, small, tiny", "model=tiny"),
        (["nogroup=3"], "there is no setting nogroup", None),
        (["model.kv_heads=3"], "must divide heads=4", "model.kv_heads=2"),
        (["model.window=0"], "model.window=0", "model.window=256"),
        (["model.window=-1"], "model.window=-1", "model.window=256"),
        (["model.window=1.5"], "model.window=1.5", None),
        (["model.window=true"], "model.window=true", None),
        (["trainer.max_steps"], "given as key=value", None),
        (["optimizer.lr=[1"], "cannot be read", None),
        (["precision=16-mixed", "trainer.device=cpu"], "needs a GPU", "precision=bf16-mixed"),
        (["--unknown"], "no such option", None),
        (["-m", "model.window=64,0"], "model.window=0", "model.window=256"),
        (["-m", "model.windw=64,128"], "there is no setting model.windw", "model.window=64,128"),
        (["seed=${oc.env:NOT_SET_ANYWHERE}"], "NOT_SET_ANYWHERE", None),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_ends_with_status_2_one_message_and_nothing_written(
    recorder: Recorder,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    expected: str,
    correction: str | None,
) -> None:
    assert run(recorder, *words) == 2
    printed = capsys.readouterr()
    assert expected in printed.err
    assert "Traceback" not in printed.err
    assert len(printed.err.strip().splitlines()) <= 2
    if correction is not None:
        assert correction in shlex.split(printed.err.splitlines()[1])
    assert not recorder.calls
    assert not list(Path.cwd().iterdir())


def test_a_mistake_is_said_within_two_seconds_without_loading_torch(tmp_path: Path) -> None:
    started = time.monotonic()
    done = run_script("train.py", "model.kv_heads=3", cwd=tmp_path)
    assert done.returncode == 2
    assert time.monotonic() - started < 2
    loaded = run_script_in_python(
        tmp_path, "import sys, windowlm, windowlm.config; print('torch' in sys.modules)"
    )
    assert loaded == "False"


def run_script_in_python(folder: Path, code: str) -> str:
    script = folder / "code.py"
    script.write_text(code)
    return run_script(str(script), cwd=folder).stdout.strip()


@pytest.mark.parametrize(
    "value",
    [
        "plain",
        "with space",
        "a,b",
        "it's",
        'say "x"',
        "[x]",
        "{a: 1}",
        "k=v",
        "back\\slash",
        "ends'",
        "#",
        "%",
        "end\\",
    ],
)
def test_paths_may_hold_any_character(recorder: Recorder, value: str) -> None:
    path = Path.cwd() / value
    assert run(recorder, f"data.path={path}", f"run_dir=out/{value}") == 0
    ((config, invocation),) = recorder.calls
    assert config.data.path == str(path)
    assert config.data.name == "text"
    assert invocation.output_dir == Path("out") / value


def test_a_sweep_runs_every_combination_in_a_folder_of_its_own(recorder: Recorder) -> None:
    assert run(recorder, "-m", "model.window=64,null", "model.kv_heads=1,4", "run_dir=sweep") == 0
    settings = [(config.model.window, config.model.kv_heads) for config, _ in recorder.calls]
    assert settings == [(64, 1), (64, 4), (None, 1), (None, 4)]
    assert [invocation.output_dir for _, invocation in recorder.calls] == [
        Path(f"sweep/{n}") for n in range(4)
    ]
    assert {invocation.sweep_dir for _, invocation in recorder.calls} == {Path("sweep").resolve()}


def test_the_folder_of_a_sweep_can_be_given_in_hydras_words(recorder: Recorder) -> None:
    assert run(recorder, "-m", "seed=1,2", "hydra.sweep.dir=elsewhere") == 0
    assert [invocation.output_dir for _, invocation in recorder.calls] == [
        Path("elsewhere/0"),
        Path("elsewhere/1"),
    ]


def test_a_sweep_of_an_experiment_is_checked_and_run(recorder: Recorder) -> None:
    assert run(recorder, "-m", "experiment=window_sweep") == 0
    assert len(recorder.calls) == 12
    assert {config.trainer.max_tokens for config, _ in recorder.calls} == {2_000_000}


def test_a_folder_with_a_run_is_refused_before_anything_is_written(
    recorder: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("old").mkdir()
    Path("old/run.json").write_text('{"status": "finished"}')
    assert run(recorder, "run_dir=old") == 2
    assert "already holds a run (finished)" in capsys.readouterr().err
    assert [entry.name for entry in Path("old").iterdir()] == ["run.json"]


def test_hydras_record_of_an_earlier_start_is_kept(recorder: Recorder) -> None:
    assert run(recorder, "run_dir=one", "seed=1") == 0
    assert run(recorder, "run_dir=one", "seed=2") == 0
    assert "seed=1" in Path("one/.hydra/overrides.yaml").read_text()
    assert "seed=2" in Path("one/.hydra-2/overrides.yaml").read_text()
