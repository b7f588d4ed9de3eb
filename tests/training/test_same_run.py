import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.training.runs import begin
from windowlm.training.checkpoint_io import AtomicCheckpointIO
from windowlm.training.same_run import differences


@pytest.fixture(scope="module")
def place(documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("same")
    shutil.copytree(documents, folder / "texts")
    for name in ("one", "two"):
        assert begin(folder / name, folder / "texts", folder / "cache") == 0
    return folder


def test_a_run_that_is_repeated_is_the_same(place: Path) -> None:
    assert differences(place / "one", place / "two") == []


def change_checkpoint(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "checkpoints" / "last.ckpt"
    content = AtomicCheckpointIO().load_checkpoint(path)
    change(content)
    AtomicCheckpointIO().save_checkpoint(content, path)


def change_momentum(folder: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        mean = content["optimizer_states"][0]["state"][0]["momentum"]
        mean.view(-1)[0] = torch.nextafter(mean.view(-1)[0], torch.tensor(1.0))

    change_checkpoint(folder, change)


def change_sign_of_zero(folder: Path) -> None:
    path = folder / "model" / "model.safetensors"
    weights = load_file(path)
    weights["embedding.weight"].view(-1)[0] = 0.0
    save_file(weights, path)
    other = folder.parent / "two" / "model" / "model.safetensors"
    weights["embedding.weight"].view(-1)[0] = -0.0
    save_file(weights, other)


def change_row(folder: Path) -> None:
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["tokens"] += 1
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))


def change_evaluation(folder: Path) -> None:
    (folder / "evaluation" / "length.json").write_text("{}")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (change_momentum, "optimizer_states.0.state.0.momentum: largest difference"),
        (change_sign_of_zero, "model.embedding.weight: largest difference 0"),
        (change_row, "metrics.jsonl, row "),
        (change_evaluation, "evaluation/length.json differs"),
    ],
)
def test_the_smallest_difference_is_named(
    change: Callable[[Path], None], line: str, place: Path, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        shutil.copytree(place / name, tmp_path / name)
    change(tmp_path / "one")
    assert line in "\n".join(differences(tmp_path / "one", tmp_path / "two"))
