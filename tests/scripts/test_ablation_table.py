"""An ablation from its sweep to its table."""

import json
from pathlib import Path

from tests.conftest import SMALL_RUN, run_script

TINY = (
    *(word for word in SMALL_RUN if not word.startswith("tokenizer=")),
    "model.ngram_embeddings=null",
    "model.value_embeddings=0",
    "trainer.max_seconds=null",
    "trainer.max_steps=4",
    "trainer.window_warmup=8",
    "evaluation.context_lengths=[16]",
    "evaluation.max_targets_per_document=64",
    "precision=32-true",
)


def test_a_sweep_of_switches_over_seeds_is_resumed_and_ends_in_a_table(
    documents: Path, workplace: Path
) -> None:
    folder = workplace / "ablation"
    words = (
        *("-m", "experiment=ablation", *TINY, f"data.path={documents}"),
        *(f"data.cache_dir={workplace / 'cache'}", f"run_dir={folder}", "resume=auto", "seed=0,1"),
        "switch=base,adamw,weight_average",
    )
    done = run_script("train.py", *words, cwd=workplace)
    assert done.returncode == 0, done.stderr
    assert not list(folder.glob("*/checkpoints"))
    again = run_script("train.py", *words, cwd=workplace)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("nothing to do") == 6
    table = run_script("scripts/ablation_table.py", str(folder), cwd=workplace)
    assert table.returncode == 0, table.stderr
    for label in (
        "(base)",
        "optimizer.kind=adamw",
        "optimizer.averaging=0.02",
    ):
        assert label in table.stdout
    result = json.loads((folder / "ablation.json").read_text())
    assert [len(cell["scores"]) for cell in (result["base"], *result["cells"])] == [2, 2, 2]
    assert all(0 <= cell["p"] <= cell["p_holm"] <= 1 for cell in result["cells"])
    assert result["first_run"]["device"].startswith("CPU")
    assert (folder / "ablation.png").stat().st_size > 10_000


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    done = run_script("scripts/ablation_table.py", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 2
    assert "no run is in it" in done.stderr
