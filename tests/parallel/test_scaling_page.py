"""The page on scaling says what model and counts say."""

import json

import pytest

from tests.conftest import PROJECT
from windowlm.parallel.scaling_model import (
    Layer,
    Machine,
    gathered_bytes,
    halo_bytes,
    long_table,
    memory_bytes,
    table,
)

PAGE = (PROJECT / "docs" / "scaling.md").read_text(encoding="utf-8")
COUNTED = json.loads((PROJECT / "docs" / "results" / "halo_bytes.json").read_text(encoding="utf-8"))


def test_the_table_is_that_of_the_model() -> None:
    gpus = (1, 2, 4, 8, 64, 512, 4096)
    assert table(Layer(), Machine(), tokens=131_072, tokens_a_gpu=65_536, gpus=gpus) in PAGE


def test_the_counted_bytes_of_eight_processes_are_those_of_the_formula() -> None:
    assert len(COUNTED["rows"]) > 5
    for row in COUNTED["rows"]:
        assert row["forward_bytes"] == row["backward_bytes"] == row["formula"]
        assert f"{row['forward_bytes']:,}" in PAGE


def test_the_model_counts_the_largest_share_that_was_counted() -> None:
    tokens, processes = COUNTED["tokens"], COUNTED["processes"]
    for row in COUNTED["rows"]:
        layer = Layer(
            kv_heads=COUNTED["kv_heads"],
            head_dim=COUNTED["head_dim"],
            window=row["window"] or tokens + 1,
            number_bytes=4,
        )
        part = tokens // processes
        # The last process receives what the first of many sends at most.
        received = [min(layer.window - 1, rank * part) for rank in range(processes)]
        assert halo_bytes(layer, tokens, processes) == layer.key_value_bytes * max(received)
        assert gathered_bytes(layer, tokens, processes) * processes == row["gathering_all"]


SPEED = Layer(dim=768, heads=12, kv_heads=4, head_dim=64, feed_forward_dim=2048)


def test_the_table_of_memory_is_that_of_the_model_and_fits_what_one_gpu_took() -> None:
    lengths = (65_536, 1), (131_072, 1), (131_072, 2), (1 << 20, 1), (1 << 20, 2), (1 << 20, 4), (1 << 20, 8)
    assert long_table(SPEED, 12, 32_768, lengths) in PAGE
    measured = json.loads((PROJECT / "docs/results/training_h100/bf16_mixed.json").read_text())["rows"]
    (peak,) = (row["peak_memory_bytes"] for row in measured if row["entrant"] == "windowlm loop")
    said = memory_bytes(SPEED, 12, 32_768, 65_536, checkpointed=False)
    assert said == pytest.approx(peak, rel=0.05)
    assert f"{peak / 1e9:.1f} GB were measured" in PAGE


def test_the_curves_of_two_processes_are_those_of_one() -> None:
    curves = json.loads((PROJECT / "docs" / "results" / "shared_curves.json").read_text(encoding="utf-8"))
    differences = [of_one["train_loss"] for of_one in curves["largest_difference"].values()]
    assert curves["steps"] == 50
    assert len(differences) == 10
    # Norms of gradients included.
    assert max(max(of_one.values()) for of_one in curves["largest_difference"].values()) <= 1e-6
    assert {"git_commit", "device", "versions"} <= curves.keys()
    assert f"are those of one to {max(differences):.1e}".replace("e-0", "e-") in PAGE
