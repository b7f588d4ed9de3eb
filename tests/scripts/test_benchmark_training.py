"""The command ``python scripts/benchmark_training.py``, on a shape that trains in seconds."""

import json
import sys
from pathlib import Path

import pytest

from tests.conftest import PROJECT, run_script

SCRIPT = "scripts/benchmark_training.py"
SHAPE = "32,1,2,1,16,32,300,8,32,64"
FEW = ("--device", "cpu", "--rounds", "1", "--steps", "2", "--warmup", "1")


def test_entrants_take_turns_and_are_written_beside_each_other(tmp_path: Path) -> None:
    entrants = ["windowlm", "windowlm loop", "transformers sdpa"]
    moved = "windowlm loop, plain loss"
    pytest.importorskip("transformers")
    done = run_script(
        SCRIPT, "--shape", SHAPE, *FEW, "--entrants", *entrants, "--out", str(tmp_path / "out"),
        "--levers", "plain loss", "--settings", "logger=none", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "training.json").read_text())
    assert [row["entrant"] for row in report["rows"]] == [*entrants, moved]
    assert report["peak_flops"] is None
    assert {"torch", "transformers", "lightning", "windowlm"} <= set(report["versions"])
    for row in report["rows"]:
        assert row["problem"] is None
        assert row["batch"] == 2
        assert len(row["rounds_s"]) == 1
        assert row["tokens_per_second"] == pytest.approx(64 / row["step_s"])
        assert row["model_flops_per_second"] > 0
        assert row["peak_memory_bytes"] > 2**20
    full_path, loop, _, _ = report["rows"]
    # Without document masking the run counts pairs of whole sequences, as the formula for the others does.
    counted, formula = (row["model_flops_per_second"] * row["step_s"] for row in (full_path, loop))
    assert counted == pytest.approx(formula, rel=1e-6)
    assert 0 <= full_path["data_wait_fraction"] <= 1
    lever, faster, overhead = report["compared"][:3]
    assert lever.startswith(f"T=32 32-true: {moved} takes ")
    assert faster.startswith("T=32 32-true: windowlm is ")
    assert faster.endswith(" as fast as transformers sdpa")
    assert overhead.endswith(" as long as windowlm loop")
    assert (tmp_path / "out" / "training.png").read_bytes().startswith(b"\x89PNG")


def test_an_entrant_that_fails_is_a_row_with_its_last_words_and_memory_grows_by_length(
    tmp_path: Path,
) -> None:
    done = run_script(
        SCRIPT, "--shape", SHAPE, *FEW, "--entrants", "windowlm", "--settings", "model.kv_heads=7",
        "--lengths", "32", "64", "--memory", "--out", str(tmp_path / "out"), cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "training.json").read_text())
    assert all("kv_heads" in row["problem"] for row in report["rows"])
    short, long = report["memory"]["32-true"]
    assert short["peak_memory_bytes"] > 2**20
    grown = long["peak_memory_bytes"] - short["peak_memory_bytes"]
    assert long["bytes_per_token"] == pytest.approx(grown / 32)


@pytest.mark.parametrize(
    ("entrant", "precision"), [("windowlm loop", "bf16-true"), ("transformers sdpa", "bf16-mixed")]
)
def test_a_worker_steps_in_half_the_bytes(
    entrant: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if entrant.startswith("transformers"):
        pytest.importorskip("transformers")
    names = (
        "dim", "layers", "heads", "kv_heads", "head_dim", "feed_forward_dim", "vocabulary_size", "window",
        "sequence_length", "tokens_per_step",
    )  # fmt: skip
    shape = dict(zip(names, map(int, SHAPE.split(",")), strict=True))
    monkeypatch.syspath_prepend(str(PROJECT / "scripts"))
    from synthetic_text import write_text

    write_text(tmp_path, shape["vocabulary_size"], 1000, seed=0)
    job = {"entrant": entrant, "shape": shape, "precision": precision, "device": "cpu", "text": str(tmp_path)}
    done = run_script(
        "scripts/training_entrants.py",
        json.dumps(job),
        cwd=tmp_path,
        input='{"steps": 1}\n{"reset_peak_memory": true}\n{"steps": 2}\n',
    )
    assert done.returncode == 0, done.stderr
    first, empty, second = map(json.loads, done.stdout.splitlines())
    assert empty == {}
    assert first["loss"] == pytest.approx(5.7, abs=0.3)  # the logarithm of the vocabulary
    assert second["seconds"] > 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--shape", "huge"], "--shape huge: speed, byte"),
        (["--shape", "32,1,2,1,16,32,300,8,32"], "10 whole numbers"),
        (["--shape", "32,1,3,2,16,32,300,8,32,64"], "kv_heads=2: must divide heads=3"),
        (["--shape", "32,1,2,1,16,32,100,8,32,64"], "a vocabulary of 256 (bytes) or more than 257"),
        (["--entrants", "magic"], "--entrants magic: windowlm"),
        (["--entrants", "transformers flex"], "it runs on a GPU only"),
        (["--lengths", "1"], "--lengths 1: a number from 2 on"),
        (["--rounds", "0"], "--rounds 0"),
        (["--settings", "data.workers"], "--settings data.workers: a setting is given as key=value"),
        (["--breakdown"], "--breakdown: it reads the kernels of a GPU"),
        (["--memory"], "--memory: a slope needs two lengths"),
        (["--precision", "16-mixed"], "bf16-mixed"),
    ],
)
def test_mistakes_end_with_status_2(
    arguments: list[str], complaint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(PROJECT / "scripts"))
    import benchmark_training

    monkeypatch.setattr(sys, "argv", [SCRIPT, "--device", "cpu", *arguments])
    with pytest.raises(SystemExit) as stopped:
        benchmark_training.main()
    assert stopped.value.code == 2
    assert complaint in capsys.readouterr().err
