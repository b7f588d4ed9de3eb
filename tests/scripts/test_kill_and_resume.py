import json
from pathlib import Path

from tests.conftest import run_script


def test_killed_runs_end_equal_bit_for_bit(tmp_path: Path) -> None:
    done = run_script(
        "scripts/kill_and_resume.py", "--cases", "adamw,bf16-true,2,wandb", "--kills", "3", "--steps", "8",
        "--out", str(tmp_path), cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "kill_and_resume.json").read_text())
    assert report["different"] == 0
    (case,) = report["cases"]
    assert len(case["kills"]) == 3
    assert case["runs"] >= 1
