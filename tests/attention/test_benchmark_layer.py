"""The layer's benchmark runs, on a small layer that is not compiled."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_overhead_and_layouts_are_timed_and_written(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "benchmark_layer.py"), "--device", "cpu", "--eager"]
    options = ["--shapes", "2,128,4,2,16,32", "--layouts", "3", "--lengths", "2", "--rounds", "1"]
    done = subprocess.run(
        [*command, *options, "--documents", "20", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "layer.json").read_text())
    (shape,) = report["shapes"]
    assert shape["documents"]
    assert shape["over_floor"] > 0
    assert report["layouts"]["batches"] == 3
    assert report["layouts"]["lengths"] == [128, 64]
    assert report["layouts"]["mask_over_attention"] > 0
