"""The command ``python scripts/score_runs.py``."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from tests.scripts.test_compare_runs import run_folder

SCRIPT = Path(__file__).parents[2] / "scripts" / "score_runs.py"

# Stands for scripts/evaluate.py: writes down its words, and takes its time where asked to.
FAKE = """
import pathlib, sys, time
with open(pathlib.Path(__file__).with_name("calls.txt"), "a") as file:
    print(*sys.argv[1:], file=file, flush=True)
if "slow=1" in sys.argv:
    time.sleep(60)
sys.exit(2 if "wrong=1" in sys.argv else 0)
"""


@pytest.fixture
def score(tmp_path, monkeypatch):
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "score_runs.py").write_text(SCRIPT.read_text())
    (scripts / "evaluate.py").write_text(FAKE)
    for number in range(3):
        run_folder(tmp_path / "runs" / str(number), number, 1.0)
        if number < 2:
            (tmp_path / "runs" / str(number) / "model").mkdir()
            (tmp_path / "runs" / str(number) / "model" / "model.safetensors").touch()

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["score_runs.py", str(tmp_path / "runs"), *words])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(scripts / "score_runs.py"), run_name="__main__")
        calls = scripts / "calls.txt"
        made = calls.read_text().splitlines() if calls.exists() else []
        calls.unlink(missing_ok=True)
        return ended.value.code, [Path(line.split()[0].removeprefix("checkpoint=")).name for line in made]

    return call


def test_finished_runs_are_scored_once_for_the_same_settings(score):
    assert score("a=1") == (0, ["0", "1"])
    assert score("a=1") == (0, [])
    assert score("a=2") == (0, ["0", "1"])
    assert score("a=1") == (0, [])


def test_scored_runs_need_no_weights_and_others_without_them_are_named(score, tmp_path, capsys):
    assert score("a=1") == (0, ["0", "1"])
    (tmp_path / "runs" / "0" / "model" / "model.safetensors").unlink()
    assert score("a=1") == (0, [])
    assert score("a=2") == (1, ["1"])
    assert f"without weights here: {tmp_path / 'runs' / '0'}" in capsys.readouterr().err
    assert score("a=1") == (0, [])


def test_it_stops_in_time_and_goes_on(score, tmp_path):
    status, calls = score("slow=1", "--seconds", "3")
    assert (status, calls) == (75, ["0"])
    assert not (tmp_path / "runs" / "0" / "scored.json").exists()
    assert score("a=1", "--seconds", "100") == (0, ["0", "1"])


def test_a_mistake_ends_it(score, tmp_path, capsys):
    assert score("wrong=1") == (2, ["0"])
    assert score("--help-me")[0] == 2
    (tmp_path / "runs" / "0" / "scored.json").write_text(json.dumps([1]))
    assert score("a=1") == (2, [])
    assert "damaged" in capsys.readouterr().err


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_are_asked_for_and_not_brought(rank, score, monkeypatch, capsys):
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    assert score("a=1") == (2, [])
    assert ("devices=N" in capsys.readouterr().err) == (rank == 0)
