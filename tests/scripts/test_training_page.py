"""The tables of the page on training are those of the results they name."""

import json
import statistics

import pytest
import scipy.stats

from tests.conftest import PROJECT

PAGE = (PROJECT / "docs/training.md").read_text()


def cells_of(text: str, columns: int) -> list[list[str]]:
    """Rows of the tables with so many columns."""
    rows = [line.split("|")[1:-1] for line in text.split("\n")]
    return [[cell.strip() for cell in row] for row in rows if len(row) == columns]


def test_the_table_of_steps_holds_what_was_measured() -> None:
    cells = cells_of(PAGE, 7)
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


def test_the_table_of_tuning_holds_what_was_measured() -> None:
    tuning = json.loads((PROJECT / "docs/results/recipe_tuning_h200.json").read_text())
    _, section = PAGE.split("## Tuned so far")
    _, _, *cells = cells_of(section, 3)
    for (change, megabytes, bits), row in zip(cells, tuning["rows"], strict=True):
        settings = [f"{key.rpartition('.')[2]}={value}" for key, value in row["changes"].items()]
        named = change.startswith("none") if not settings else change.count("`") == 2 * len(settings)
        assert named
        assert all(setting in change for setting in settings)
        assert float(megabytes) == row["megabytes"]
        assert float(bits) == pytest.approx(row["validation_bits_per_byte"], abs=0.00051)
    kernels = tuning["step_milliseconds_by_kernel"]
    products, attention, convolutions, activation, _ = kernels.values()
    said = (
        f"trains on {tuning['tokens_per_second_alone'] / 1e6:.2f} million bytes a second with whole windows; "
        f"of {sum(kernels.values()):.1f} ms of kernels a step, products take {products:.1f}, attention "
        f"{attention:.1f}, short convolutions with what torch fuses to them {convolutions:.1f} and the "
        f"activation {activation:.1f}."
    )
    assert said in section.replace("\n", " ")


def test_the_table_of_optimizers_holds_what_was_measured() -> None:
    found = json.loads((PROJECT / "docs/results/default_optimizer_cpu.json").read_text())
    _, section = PAGE.split("## The default\n")
    cells = {row[0].strip("`"): row[1:] for row in cells_of(section, 7)[2:4]}
    of_kinds = []
    for kind in ("muon", "adamw"):
        rows = [row for row in found["rows"] if row["optimizer"] == kind]
        bits = [row["validation_bits_per_byte"] for row in rows]
        steps = [row["steps"] for row in rows]
        of_kinds.append(bits)
        assert cells[kind] == [
            f"{min(steps)} to {max(steps)}",
            *(f"{value:.3f}" for value in (*bits, statistics.mean(bits), statistics.stdev(bits))),
        ]
    welch = scipy.stats.ttest_ind(*of_kinds, equal_var=False)
    assert f"p-value is {welch.pvalue:.4f}." in section
