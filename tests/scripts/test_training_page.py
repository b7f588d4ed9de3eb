"""The table of training speed in the docs is that of the results it names."""

import json

import pytest

from tests.conftest import PROJECT


def test_the_table_of_steps_holds_what_was_measured() -> None:
    rows = [line.split("|")[1:-1] for line in (PROJECT / "docs/training.md").read_text().split("\n")]
    cells = [[cell.strip() for cell in row] for row in rows if len(row) == 7]
    found = {(weights, who): rest for weights, who, *rest in cells if weights.startswith("bf16")}
    for path in (PROJECT / "docs/results/training_h100").glob("*.json"):
        for row in json.loads(path.read_text())["rows"]:
            rate, step, share, memory, energy = found.pop((row["precision"], row["entrant"]))
            assert rate == f"{row['tokens_per_second']:,.0f}"
            assert float(step) == pytest.approx(1e3 * row["step_s"], abs=0.051)
            assert float(share.rstrip("%")) == pytest.approx(100 * row["mfu"], abs=0.051)
            assert float(memory) == pytest.approx(row["peak_memory_bytes"] / 2**30, abs=0.0051)
            joules = row["joules_per_million_tokens"]
            assert energy == ("" if joules is None else f"{joules:,.0f}")
    assert not found
