import json
from pathlib import Path

import pytest

from tests.conftest import run_script


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("adamw,bf16-true,2,wandb", ()),
        # As tests/training/test_cuda.py starts it on a GPU.
        ("muon,bf16-mixed,0,none", ("--deterministic", "--dropout", "0")),
    ],
)
def test_killed_runs_end_equal_bit_for_bit(case: str, words: tuple[str, ...], tmp_path: Path) -> None:
    done = run_script(
        "scripts/kill_and_resume.py", "--cases", case, "--kills", "3", "--steps", "8", *words,
        "--out", str(tmp_path), cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "kill_and_resume.json").read_text())
    assert report["different"] == 0
    (tried,) = report["cases"]
    assert len(tried["kills"]) == 3
    assert tried["runs"] >= 1


def test_a_device_that_is_not_there_is_said(tmp_path: Path) -> None:
    environment = {"CUDA_VISIBLE_DEVICES": ""}
    done = run_script("scripts/kill_and_resume.py", "--device", "cuda", cwd=tmp_path, environment=environment)
    assert done.returncode == 2
    assert "trainer.device=cuda: this machine shows no CUDA GPU" in done.stderr
    assert "Traceback" not in done.stderr
