import json
from pathlib import Path

from tests.conftest import run_script


def test_a_short_soak_is_seen_and_judged(tmp_path: Path) -> None:
    done = run_script(
        "scripts/soak.py",
        "--steps",
        "240",
        "--settle",
        "120",
        "--layouts",
        "20",
        "--out",
        str(tmp_path),
        cwd=tmp_path,
    )
    report = json.loads((tmp_path / "soak.json").read_text())
    assert report["steps"] == 240, done.stderr
    assert len(report["file_handles"]) == len(report["threads"]) == 1
    assert report["layouts"] == 20
    assert report["recompilations"] == 0
    assert report["rows"][-1]["resident_bytes"] > 2**20
    assert report["largest_growth"] <= 0.02
    assert len(report["files"]) == 1
    assert report["bytes_beside_metrics"][-1] < 400_000
    assert report["holds"] is True
    assert done.returncode == 0, done.stderr
