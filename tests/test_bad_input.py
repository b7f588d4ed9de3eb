"""Every wrong input of the table ends with status 2, one message and an untouched file system."""

import hashlib
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from tests.bad_inputs import BadInput, bad_inputs
from tests.conftest import PROJECT, SMALL_RUN, write_documents
from tests.permissions import locked
from windowlm.command_line import Command, main
from windowlm.config import EvaluateConfig, TrainConfig
from windowlm.evaluation.own_settings import with_own_settings
from windowlm.training.initial_model import adopt_initial_model
from windowlm.training.run_folder import check_run_folder

CONF = PROJECT / "conf"
INPUTS = bad_inputs()
ONE_SCREEN = 24
SCRIPTS = {"train": PROJECT / "train.py", "evaluate": PROJECT / "scripts" / "evaluate.py"}
# The message of a mistake comes before the plan; a file that is read for a plan is read as for a run.
SETTINGS = (*SMALL_RUN, "logger=none", "plan=true")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with good text and a run of two steps."""
    folder = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_documents(Path("books"), 20)
        Path("books/document 00.txt").rename("books/a.txt")
        words = [*SMALL_RUN, "data.path=books", "data.cache_dir=cache", "logger=none", "run_dir=run"]
        assert run("train", [*words, "trainer.max_steps=2"]) == 0
        shutil.copy("run/checkpoints/last.ckpt", "run/checkpoints/previous.ckpt")
    return folder


def run(command: str, words: list[str]) -> int:
    """The command in this process."""
    if command not in SCRIPTS:
        script = str(PROJECT / "scripts" / f"{command}.py")
        sys.argv = [script, *words]
        with pytest.raises(SystemExit) as left:
            runpy.run_path(script, run_name="__main__")
        return int(left.value.code or 0)
    task = runpy.run_path(str(SCRIPTS[command]))[command]
    if command == "train":
        made = Command(
            name="train",
            config_type=TrainConfig,
            task=task,
            check=check_run_folder,
            adopt=adopt_initial_model,
            fixes_run_dir=True,
            devices="trainer.devices",
        )
    else:
        made = Command(
            name="evaluate",
            config_type=EvaluateConfig,
            task=task,
            complete=with_own_settings,
            devices="devices",
        )
    return main(made, SCRIPTS[command], CONF, words)


def state_of(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder, and where every link leads, but for the cache."""
    state = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if name.parts[0] != "cache":
            content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
            state[str(name)] = str(path.readlink()) if path.is_symlink() else content
    return state


@pytest.mark.parametrize("entry", INPUTS, ids=lambda entry: entry.name)
def test_a_wrong_input_ends_with_one_message(
    entry: BadInput,
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    work = tmp_path / "work"
    shutil.copytree(place, work)
    assert entry.said
    monkeypatch.chdir(work)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    entry.make(work)
    before = state_of(work)
    words = list(entry.words)
    if entry.command == "train":
        given = {word.partition("=")[0] for word in words}
        usual = [*SETTINGS, "data.path=books", "data.cache_dir=cache"]
        words += [word for word in usual if word.partition("=")[0] not in given and is_free(word, given)]
    capfd.readouterr()
    with locked([work / path for path in entry.locked]):
        status = run(entry.command, words)
    message = capfd.readouterr().err
    assert status == 2, message
    assert "Traceback" not in message
    assert 1 <= len(message.strip().splitlines()) <= ONE_SCREEN
    assert len(message) < 80 * ONE_SCREEN, message
    assert re.search(entry.said if "|" in entry.said else re.escape(entry.said), message), message
    assert state_of(work) == before


def test_a_full_standard_output_is_named(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert run("generate", ["checkpoint=run", "prompt=abc", "max_new_tokens=2"]) == 2
    assert capfd.readouterr().err == "error: standard output: No space left on device; send it elsewhere\n"


def is_free(word: str, given: set[str]) -> bool:
    """Whether a usual setting stands beside those that are tried."""
    key = word.partition("=")[0]
    return not any(key.startswith(f"{name}.") or name.startswith(f"{key}.") for name in given) and not (
        key == "tokenizer" and "tokenizer.path" in given
    )


def test_the_table_holds_as_many_as_are_promised() -> None:
    assert len(INPUTS) >= 200
    assert len({entry.name for entry in INPUTS}) == len(INPUTS)
