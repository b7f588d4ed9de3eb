"""Precisions are compared by runs of train.py, and what a CPU lacks is told and not trained."""

import json
from pathlib import Path

from tests.conftest import PROJECT, SMALL_RUN, run_script


def test_each_precision_is_trained_or_refused_with_the_reason(documents: Path, workplace: Path) -> None:
    settings = [word for word in SMALL_RUN if not word.startswith(("precision=", "logger"))]
    done = run_script(
        "scripts/compare_precisions.py",
        *("--steps", "10", "--out", "precisions.json", f"data.path={documents}"),
        *(f"data.cache_dir={workplace / 'cache'}", *settings),
        cwd=workplace,
    )
    assert done.returncode == 0, done.stderr
    rows = {row["precision"]: row for row in json.loads((workplace / "precisions.json").read_text())["rows"]}
    assert list(rows) == ["32-true", "16-mixed", "bf16-mixed", "bf16-true", "fp8"]
    assert "float16 needs a GPU" in rows["16-mixed"]["refused"]
    assert "float8 products need a GPU" in rows["fp8"]["refused"]
    assert rows["32-true"]["train_loss_over_float32"] == 0
    for name in ("bf16-mixed", "bf16-true"):
        assert 0 < abs(rows[name]["train_loss_over_float32"]) < 0.01
        assert 0 < abs(rows[name]["validation_loss_over_float32"]) < 0.01


def test_a_setting_that_train_refuses_ends_it(workplace: Path) -> None:
    done = run_script("scripts/compare_precisions.py", "model.heads=0", cwd=workplace)
    assert done.returncode == 2
    assert done.stderr.startswith("32-true: ")
    assert "model.heads" in done.stderr


def test_the_page_says_what_was_measured() -> None:
    page = (PROJECT / "docs" / "training.md").read_text(encoding="utf-8")
    rows = json.loads((PROJECT / "docs" / "results" / "precisions_cpu.json").read_text())["rows"]
    for row in rows:
        if "refused" in row:
            continue
        assert abs(row["train_loss_over_float32"]) < 0.01
        assert abs(row["validation_loss_over_float32"]) < 0.01
        cells = [row["precision"]]
        for name in ("train_loss", "validation_loss"):
            beyond = row[f"{name}_over_float32"]
            cells += [f"{row[name]:.4f}", f"{beyond:+.2%}" if beyond else ""]
        assert f"| {' | '.join(cells)} |".replace("|  |", "| |") in page
