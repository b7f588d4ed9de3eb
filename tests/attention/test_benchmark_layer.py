"""The layer's benchmark runs, on a small layer that is not compiled."""

import json
import sys
from pathlib import Path

import pytest

from tests.conftest import run_script

ROOT = Path(__file__).parents[2]


def test_overhead_and_layouts_are_timed_and_written(tmp_path: Path) -> None:
    done = run_script(
        "scripts/benchmark_layer.py", "--device", "cpu", "--eager", "--shapes", "2,128,4,2,16,32",
        "--layouts", "3", "--lengths", "2", "--layers", "2", "--rounds", "1", "--documents", "20",
        "--out", str(tmp_path),
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "layer.json").read_text())
    (shape,) = report["shapes"]
    assert shape["documents"]
    assert shape["over_floor"] > 0
    assert report["layouts"]["batches"] == 3
    assert report["layouts"]["lengths"] == [128, 64]
    assert report["layouts"]["mask_over_attention"] > 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--shapes", "1,64,2,1,7,4"], "--shapes 1,64,2,1,7,4: head_dim 7 is odd"),
        (["--shapes", "1,64,2,1,8,4", "--layouts", "1", "--lengths", "65"], "--lengths 65: at most 64"),
        (["--lengths", "4"], "--lengths 4: beside --layouts it is allowed"),
        (["--device", "potato"], "--device: potato: "),
        (["--out", __file__], f"--out {__file__}: a folder that can be written is allowed"),
        (["--layouts", "-1"], "--layouts -1: "),
    ],
)
def test_mistakes_end_with_status_2(
    arguments: list[str], complaint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import benchmark_layer

    monkeypatch.setattr(sys, "argv", ["benchmark_layer.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        benchmark_layer.main()
    assert stopped.value.code == 2
    assert complaint in capsys.readouterr().err
