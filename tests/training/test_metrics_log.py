import csv
import math
from pathlib import Path

import pytest

from windowlm.errors import UserError
from windowlm.training.metrics_log import MetricsLog


def filled(path: Path) -> MetricsLog:
    log = MetricsLog(path)
    for step in (10, 20, 30):
        log.append({"step": step, "train_loss": 1 / step})
    return log


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    rows = filled(tmp_path / "metrics.jsonl").rows()
    assert rows == [{"step": step, "train_loss": 1 / step} for step in (10, 20, 30)]


def test_a_line_cut_by_a_kill_is_not_a_row(tmp_path: Path) -> None:
    log = filled(tmp_path / "metrics.jsonl")
    with log.path.open("a") as file:
        file.write('{"step": 40, "train_lo')
    assert [row["step"] for row in log.rows()] == [10, 20, 30]


@pytest.mark.parametrize("step", ["true", "-5", "1.5", "null"])
def test_a_row_of_no_step_is_damaged(step: str, tmp_path: Path) -> None:
    log = filled(tmp_path / "metrics.jsonl")
    with log.path.open("a") as file:
        file.write(f'{{"step": {step}}}\n')
    with pytest.raises(UserError, match="line 4 is damaged"):
        log.rows()


def test_cutting_back_keeps_what_the_checkpoint_knows(tmp_path: Path) -> None:
    log = filled(tmp_path / "metrics.jsonl")
    log.cut_back(20)
    log.append({"step": 21})
    assert [row["step"] for row in log.rows()] == [10, 20, 21]


def test_the_table_has_a_column_for_every_name(tmp_path: Path) -> None:
    log = filled(tmp_path / "metrics.jsonl")
    log.append({"step": 30, "validation_loss": 2.0})
    log.write_csv(tmp_path / "metrics.csv")
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["step", "train_loss", "validation_loss"]
    assert rows[-1] == {"step": "30", "train_loss": "", "validation_loss": "2.0"}


def test_what_is_not_finite_is_written_as_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"step": 1, "train_loss": math.nan, "gradient_norm": math.inf, "seconds": 1.0})
    assert log.rows() == [{"step": 1, "train_loss": None, "gradient_norm": None, "seconds": 1.0}]
    assert "NaN" not in log.path.read_text(encoding="utf-8")
