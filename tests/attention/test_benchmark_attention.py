"""The benchmark: the peers at hand compute the function that they are timed for, and mistakes are said."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def benchmark(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(ROOT / "scripts" / "benchmark_attention.py"), "--threads", "1"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)


def test_ours_and_the_peers_at_hand_are_checked_timed_and_written(tmp_path: Path) -> None:
    entrants = ["windowlm", "chunked sdpa", "causal sdpa", "causal cudnn"]
    shapes = ["2,256,4,2,16,64", "1,256,4,4,16,128"]
    done = benchmark(
        "--shapes",
        *shapes,
        "--entrants",
        *entrants,
        "--rounds",
        "2",
        "--out",
        str(tmp_path),
        "--device",
        "cpu",
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "attention.json").read_text())
    assert [shape["shape"] for shape in report["shapes"]] == shapes
    for shape in report["shapes"]:
        rows = {row["name"]: row for row in shape["rows"]}
        for name in ("windowlm:banded", "windowlm:reference", "chunked sdpa", "causal sdpa"):
            assert rows[name]["problem"] is None
            assert 0 < rows[name]["error_over_plain"] < 4
            assert 0 < rows[name]["least_total_ms"] <= rows[name]["total_ms"]
        assert rows[shape["auto"]]["total_ratio"] == 1
        assert rows["causal cudnn"]["absent"]
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")


def test_packed_documents_reach_the_peers_that_have_them() -> None:
    done = benchmark(
        "--shapes", "2,256,2,1,16,64", "--documents", "40", "--entrants", "windowlm:banded", "chunked sdpa",
        "causal sdpa", "--rounds", "1", "--device", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "chunked sdpa: ready" in done.stdout
    assert "causal sdpa: unsupported: it has no documents" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--shapes", "Z"], "--shapes Z: A, B"),
        (["--shapes", "1,64,3,2,8,4"], "--shapes 1,64,3,2,8,4"),
        (["--entrants", "magic"], "--entrants magic: windowlm"),
        (["--rounds", "0"], "--rounds 0"),
    ],
)
def test_mistakes_end_with_status_2(arguments: list[str], complaint: str) -> None:
    done = benchmark(*arguments)
    assert done.returncode == 2
    assert complaint in done.stderr
