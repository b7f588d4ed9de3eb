import json
import os
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from tests.conftest import PROJECT
from tests.training.runs import begin
from windowlm.errors import exit_status


@pytest.fixture(scope="module")
def finished(documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reproduce")
    shutil.copytree(documents, folder / "texts")
    assert begin(folder / "run", folder / "texts", folder / "cache") == 0
    return folder / "run"


def reproduce(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *arguments])
    return exit_status(runpy.run_path(str(PROJECT / "scripts" / "reproduce.py"))["main"])


def test_a_run_is_reproduced_from_its_folder(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert reproduce(monkeypatch, str(finished)) == 0
    assert "reproduced, equal bit for bit" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before
    record = json.loads((finished / "run.json").read_text())
    for name in ("git_commit", "git_changed_files", "python", "versions", "device", "command"):
        assert name in record
    assert {"source_identity", "tokenizer_identity"} <= record["prepared_data"].keys()
    assert json.loads((finished / "config.json").read_text())["seed"] == 0


def test_what_is_not_the_same_is_said(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(finished, other)
    config = json.loads((other / "config.json").read_text())
    monkeypatch.chdir(finished.parent)
    config |= {"seed": 1, "data": {**config["data"], "path": "texts"}}
    (other / "config.json").write_text(json.dumps(config))
    record = json.loads((other / "run.json").read_text())
    record |= {"python": "3.0", "processes_changed": True, "working_folder": str(tmp_path / "gone")}
    record["versions"] = {"torch": record["versions"]["torch"], "numpy": "0.1"}  # an earlier one, of fewer
    (other / "run.json").write_text(json.dumps(record))
    assert reproduce(monkeypatch, str(other), "--into", str(tmp_path / "again")) == 1
    screen = capsys.readouterr()
    assert 'note: python was "3.0" and is' in screen.err
    assert re.search(r'note: versions was {"torch": "[^"]+", "numpy": "0\.1"} and is {"torch"', screen.err)
    assert "safetensors" not in screen.err
    assert "note: the run went on with another number of processes" in screen.err
    assert f'gone", which is not here, so texts is looked for in {finished.parent}' in screen.err
    assert "metrics.jsonl, row 1" in screen.out
    assert (tmp_path / "again" / "evaluation" / "length.json").exists()


def test_a_run_that_started_from_the_state_of_another_is_reproduced_from_it(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts, cache = finished.parent / "texts", finished.parent / "cache"
    further = {"trainer": {"max_steps": 10}}
    assert begin(tmp_path / "second", texts, cache, resume=str(finished), **further) == 0
    assert reproduce(monkeypatch, str(tmp_path / "second")) == 0
    screen = capsys.readouterr()
    assert f"note: the run started from the newest state of {finished}, which may be another" in screen.err
    assert "reproduced, equal bit for bit" in screen.out


def test_a_run_that_was_made_in_pieces_is_reproduced_in_one(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts, cache, folder = finished.parent / "texts", finished.parent / "cache", tmp_path / "pieces"
    statuses = [75]
    while statuses[-1] == 75 and len(statuses) < 20:
        statuses.append(begin(folder, texts, cache, trainer={"max_steps": 3, "max_time": 1e-9}))
    assert statuses.count(75) > 2
    assert statuses[-1] == 0
    assert reproduce(monkeypatch, str(folder)) == 0
    assert "reproduced, equal bit for bit" in capsys.readouterr().out


def test_a_run_that_went_on_with_another_budget_is_said_to_have(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts, cache, folder = finished.parent / "texts", finished.parent / "cache", tmp_path / "longer"
    for steps, changed in ((4, False), (8, True), (8, True)):
        assert begin(folder, texts, cache, trainer={"max_steps": steps}) == 0
        assert json.loads((folder / "run.json").read_text())["budget_changed"] is changed
    assert reproduce(monkeypatch, str(folder)) == 1
    screen = capsys.readouterr()
    assert "note: the run went on with another budget" in screen.err
    assert "not reproduced" in screen.out


def test_what_is_no_finished_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert reproduce(monkeypatch, str(tmp_path)) == 2
    assert not os.listdir(tmp_path)
