"""The command ``python scripts/compare_runs.py``."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from tests.conftest import run_script, start_script

SCRIPT = Path(__file__).parents[2] / "scripts" / "compare_runs.py"


def run_folder(path, window, bits):
    """The least that an evaluated run holds."""
    row = {
        "context_length": 8,
        "targets": 10,
        "bytes": 10,
        "nats": bits,
        "perplexity": 2.0,
        "bits_per_byte": bits,
        "extrapolation": False,
    }
    result = {
        "format": 2,
        "cluster": "document",
        "training_length": 16,
        "rows": [row],
        "targets_hash": "same",
        "tokenizer_identity": "bytes",
        "precision": "32-true",
        "parameters": 1000,
        "tokens_trained": 5,
        "documents": [
            {"document_hash": name, "author": None, "bytes": 5, "nats": {"8": bits}} for name in "ab"
        ],
    }
    (path / "evaluation").mkdir(parents=True)
    (path / "evaluation" / "length.json").write_text(json.dumps(result))
    (path / "config.json").write_text(json.dumps({"model": {"window": window}}))


def test_a_folder_of_runs_is_compared(tmp_path):
    folder = tmp_path / "a sweep, with = in its name"
    run_folder(folder / "0", 64, 1.5)
    run_folder(folder / "1", None, 1.25)
    done = start_script("scripts/compare_runs.py", str(folder), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1.5000" in done.stdout
    assert "1.2500" in done.stdout
    assert (folder / "comparison.csv").is_file()
    assert (folder / "comparison.png").is_file()
    assert (folder / "comparison.html").is_file()


def test_two_runs_are_compared(tmp_path):
    run_folder(tmp_path / "0", 64, 1.5)
    run_folder(tmp_path / "1", None, 1.25)
    done = run_script("scripts/compare_runs.py", "0", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "model.window" in done.stdout
    # 0.25 nats fewer on 5 bytes in both documents.
    assert "-0.0721 ± 0.0000" in done.stdout
    assert not list(tmp_path.glob("*.png"))


def test_another_evaluation_is_compared_by_its_name(tmp_path):
    for number, bits in enumerate((1.5, 1.25)):
        run_folder(tmp_path / str(number), 64, bits)
        (tmp_path / str(number) / "evaluation").rename(tmp_path / str(number) / "evaluation_book")
        (tmp_path / str(number) / "run.json").write_text("{}")
    done = run_script("scripts/compare_runs.py", ".", "--evaluation", "evaluation_book", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1.2500" in done.stdout
    assert {path.name for path in tmp_path.glob("*.*")} == {
        f"comparison_book.{kind}" for kind in ("csv", "png", "html")
    }
    done = run_script("scripts/compare_runs.py", ".", cwd=tmp_path)
    assert done.returncode == 2
    assert "none of its 2 runs holds a result in evaluation/" in done.stderr


def test_mistakes_end_with_status_2_and_one_message(tmp_path, monkeypatch, capsys):
    for arguments, message in [
        ([tmp_path / "nowhere"], "there is no such folder"),
        ([tmp_path], "no run is in it"),
        ([tmp_path, tmp_path], "not a run"),
        ([tmp_path] * 3, "give one folder of runs, or two run folders"),
        ([], "required"),
        ([tmp_path, "--evaluation", "../elsewhere"], "the name of a folder in each run, not a path"),
    ]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        output = capsys.readouterr()
        assert ended.value.code == 2
        assert message in output.err
        assert output.out == ""
