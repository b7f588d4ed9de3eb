import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import windowlm
from tests.conftest import run_script, start_script
from windowlm.attention.config import RotaryConfig
from windowlm.training.metrics_log import WALL_CLOCK_COLUMNS
from windowlm.training.offline_wandb import history_differences, read_offline_run


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def deterministic(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: row[name] for name in row if name not in WALL_CLOCK_COLUMNS} for row in rows]


def test_the_folder_of_a_run_holds_what_the_screen_says(finished_run: tuple[Path, str]) -> None:
    folder, screen = finished_run
    for name in (
        "model",
        "evaluation",
        "metrics.jsonl",
        "checkpoints",
        "config.json",
        "run.json",
        ".hydra",
        "wandb",
    ):
        assert (folder / name).exists()
        assert f"  {name}" in screen
    assert not [path for path in folder.rglob("*") if "=" in path.name]
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"


def test_the_screen_says_what_a_reader_needs(finished_run: tuple[Path, str]) -> None:
    _, screen = finished_run
    for needed in (
        "parameters",
        "receptive field 16 tokens",
        "bytes a token",
        "FLOPs",
        "backend",
        "precision",
        "source hash",
        "gzip",
        "xz",
        "python scripts/evaluate.py 'checkpoint=finished run, 1' data.path=FILE_OR_FOLDER",
        "wandb sync",
    ):
        assert needed in screen


def test_metrics_hold_every_promised_column(finished_run: tuple[Path, str]) -> None:
    rows = metrics(finished_run[0])
    training = [row for row in rows if "train_loss" in row]
    assert [row["step"] for row in training] == [2, 4, 6, 8, 10, 12]
    for row in training:
        assert row["tokens"] == row["step"] * 128
        for name in (
            "train_bits_per_byte",
            "learning_rate",
            "gradient_norm",
            "tokens_per_second",
            "model_flops_per_second",
            "peak_memory_bytes",
            "data_wait_fraction",
        ):
            assert math.isfinite(row[name])
            assert row[name] >= 0
    assert "validation_bits_per_byte" in rows[-1]
    assert rows[-1]["step"] == 12


def test_a_byte_model_starts_near_eight_bits_a_byte_and_learns(finished_run: tuple[Path, str]) -> None:
    rows = [row for row in metrics(finished_run[0]) if "train_loss" in row]
    assert rows[0]["train_bits_per_byte"] == pytest.approx(8, abs=0.3)
    assert rows[-1]["train_bits_per_byte"] < rows[0]["train_bits_per_byte"]


def test_the_evaluation_has_a_row_for_each_context_length(finished_run: tuple[Path, str]) -> None:
    rows = json.loads((finished_run[0] / "evaluation" / "length.json").read_text())["rows"]
    assert [row["context_length"] for row in rows] == [1, 2, 4, 8, 16, 32]
    assert len({(row["targets"], row["bytes"]) for row in rows}) == 1
    for row in rows:
        assert row["bits_per_byte"] == pytest.approx(row["nats"] / row["bytes"] / math.log(2))
        assert row["perplexity"] == pytest.approx(math.exp(row["nats"] / row["targets"]))


def test_the_loaded_model_is_that_of_the_last_step(finished_run: tuple[Path, str]) -> None:
    folder, _ = finished_run
    bundle = windowlm.load(folder)
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 12
    for name, value in bundle.model.state_dict().items():
        assert torch.equal(value, checkpoint["state_dict"][f"model.{name}"])
    tokens = torch.from_numpy(bundle.tokenizer.encode("wide windows").astype("int64"))
    assert bundle.model(tokens[None]).shape == (1, 12, 256)


def test_the_offline_wandb_run_holds_config_metrics_and_table(finished_run: tuple[Path, str]) -> None:
    folder, screen = finished_run
    (offline,) = (folder / "wandb").glob("offline-run-*")
    assert f"wandb sync 'finished run, 1/wandb/{offline.name}'" in screen
    read = read_offline_run(offline)
    assert read["id"] == json.loads((folder / "run.json").read_text())["wandb_id"]
    assert read["config"]["model"]["window"] == 16
    assert read["config"]["git_commit"] is None or len(read["config"]["git_commit"]) == 40
    assert read["config"]["prepared_data"]["source_identity"] in screen
    assert read["exit_code"] == 0
    assert history_differences(folder) == []
    (path,) = [row["evaluation/length/path"] for row in read["history"] if "evaluation/length/path" in row]
    content = json.loads((offline / "files" / path).read_text())
    expected = json.loads((folder / "evaluation" / "length.json").read_text())["rows"]
    column = content["columns"].index("bits_per_byte")
    assert [row[column] for row in content["data"]] == [row["bits_per_byte"] for row in expected]
    assert any("evaluation/length_plot/path" in row for row in read["history"])


def test_a_stopped_run_goes_on_to_the_same_weights_and_metrics(
    finished_run: tuple[Path, str], small_run: tuple[str, ...], workplace: Path
) -> None:
    folder = workplace / "stopped"
    words = (*small_run, "trainer.max_steps=12", f"run_dir={folder}", "logger.tags=[test]", "resume=auto")
    for _ in range(2):
        stopped = run_script("train.py", *words, "trainer.max_time=0.01", cwd=workplace)
        assert stopped.returncode == 75, stopped.stderr
        assert "resume=auto goes on" in stopped.stdout
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "stopped"
    wandb_id = record["wandb_id"]

    resumed = run_script("train.py", *words, "data.workers=1", cwd=workplace)
    assert resumed.returncode == 0, resumed.stderr
    assert "going on from step 2 " in resumed.stdout

    expected = load_file(finished_run[0] / "model" / "model.safetensors")
    for name, value in load_file(folder / "model" / "model.safetensors").items():
        assert torch.equal(value, expected[name])
    assert deterministic(metrics(folder)) == deterministic(metrics(finished_run[0]))
    (offline,) = (folder / "wandb").glob("offline-run-*")
    read = read_offline_run(offline)
    assert read["id"] == wandb_id
    assert history_differences(folder) == []

    again = run_script("train.py", *words, cwd=workplace)
    assert again.returncode == 0
    assert "nothing to do" in again.stdout

    changed = run_script("train.py", *words, "optimizer.lr=0.5", cwd=workplace)
    assert changed.returncode == 2
    assert "optimizer.lr=0.5" in changed.stderr
    assert "optimizer.lr=0.006" in changed.stderr


def test_a_sweep_ends_with_an_evaluation_of_each_run_and_a_comparison(
    small_run: tuple[str, ...], workplace: Path
) -> None:
    folder = workplace / "sweep"
    done = run_script(
        "train.py",
        "-m",
        *small_run,
        "trainer.max_steps=3",
        "model.window=2,null",
        "precision=32-true,bf16-mixed",
        f"run_dir={folder}",
        cwd=workplace,
    )
    assert done.returncode == 0, done.stderr
    assert len(list(folder.glob("*/evaluation/length.json"))) == 4
    groups = {read_offline_run(run)["group"] for run in folder.glob("*/wandb/offline-run-*")}
    assert groups == {"sweep"}

    table = run_script("scripts/compare_runs.py", str(folder), cwd=workplace)
    assert table.returncode == 0, table.stderr
    assert " window " in table.stdout
    assert "precision" in table.stdout
    assert list(folder.glob("*.png"))

    two = run_script("scripts/compare_runs.py", str(folder / "0"), str(folder / "2"), cwd=workplace)
    assert two.returncode == 0, two.stderr
    assert "model.window" in two.stdout


def test_every_option_of_the_attention_is_trained_kept_and_compared(
    small_run: tuple[str, ...], workplace: Path
) -> None:
    words = (
        *("-m", *small_run, "trainer.max_steps=2", "logger=none", "run_dir=options", "resume=auto"),
        *("model.layers=2", "model.window=[16,null]", "model.attention_sinks=2", "model.learned_sinks=true"),
        *("model.output_gate=true", "model.logit_cap=20", "model.rotary=[{base: 100},null],null"),
    )
    done = run_script("train.py", *words, cwd=workplace)
    assert done.returncode == 0, done.stderr
    assert "2 sinks; learned sinks; output gate; logit cap 20.0; rotary base 100 none (by layer)" in " ".join(
        done.stdout.split()
    )
    folder = workplace / "options"
    model = windowlm.load(folder / "0").model
    assert model.config.rotary == [RotaryConfig(base=100.0), None]
    assert windowlm.load(folder / "1").model.config.rotary is None
    for block in model.blocks:
        assert block.attention.gate.weight.abs().min() > 0
        assert block.attention.sink_logits.abs().min() > 0
    again = run_script("train.py", *words, cwd=workplace)
    assert again.returncode == 0, again.stderr
    table = run_script("scripts/compare_runs.py", str(folder), cwd=workplace)
    assert table.returncode == 0, table.stderr
    rows = list(csv.DictReader((folder / "comparison.csv").read_text().splitlines()))
    assert "[{base: 100.0, fraction: 1.0, scaling: null},null]" in {row["model.rotary"] for row in rows}


def test_the_users_own_documents_are_scored(
    finished_run: tuple[Path, str], workplace: Path, tmp_path: Path
) -> None:
    book = tmp_path / "a, [b] = 'c'.txt"
    book.write_text("sees few keys and the cache stays short. " * 30, encoding="utf-8")
    done = start_script(
        "scripts/evaluate.py",
        f"checkpoint={finished_run[0]}",
        f"data.path={book}",
        "evaluation.context_lengths=[8,16]",
        f"output_dir={tmp_path / 'scored'}",
        cwd=workplace,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "scored" / "length.json").read_text())
    assert [row["context_length"] for row in result["rows"]] == [8, 16]
    assert result["rows"][0]["bytes"] == 41 * 30 - 16
    assert result["precision"] == "32-true"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["data.path=nowhere"], "data.path"),
        (["trainer.device=cuda"], "trainer.device=cuda"),
        (["evaluation.context_lengths=[100000]"], "evaluation.context_lengths"),
    ],
)
def test_what_data_or_device_show_to_be_wrong_ends_with_status_2(
    small_run: tuple[str, ...], workplace: Path, tmp_path: Path, words: list[str], expected: str
) -> None:
    if "trainer.device=cuda" in words and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = run_script("train.py", *small_run, *words, f"run_dir={tmp_path / 'run'}", cwd=workplace)
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
