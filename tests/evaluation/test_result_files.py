"""Files of an evaluation."""

import csv
import json

import pytest

from windowlm.errors import UserError
from windowlm.evaluation.config import EvaluationConfig
from windowlm.evaluation.length_sweep import length_sweep
from windowlm.evaluation.result_files import csv_of_rows, evaluation_name, read_result, write_results

from .fakes import ReachModel, one_byte_each, random_documents
from .test_length_sweep import FACTS

NAMES = {"length.json", "length.csv", "length.png", "targets.json", "losses.parquet"}


def swept(seed=0):
    evaluation = EvaluationConfig(context_lengths=[4, 8])
    model = ReachModel(11, reach=6, seed=seed)
    return length_sweep(model, random_documents([60, 40]), one_byte_each(), evaluation, FACTS)


def test_the_files_agree_with_the_result(tmp_path):
    result, targets, losses = swept()
    folder = tmp_path / "evaluation"
    assert write_results(folder, result, targets, losses, {"length.png": b"plot"}) is None
    assert {path.name for path in folder.iterdir()} == NAMES
    assert read_result(tmp_path) == result
    assert (folder / "length.png").read_bytes() == b"plot"
    written = json.loads((folder / "targets.json").read_text())
    assert (written["hash"], written["documents"]) == (targets.hash, targets.byte_ranges)
    rows = list(csv.DictReader((folder / "length.csv").open()))
    assert [int(row["context_length"]) for row in rows] == [4, 8]
    assert float(rows[1]["bits_per_byte"]) == result["rows"][1]["bits_per_byte"]
    assert float(rows[1]["change_mean"]) == result["rows"][1]["change_from_shortest"]["mean"]
    assert rows[0]["change_mean"] == ""


def test_another_result_keeps_the_earlier_one_and_the_same_result_moves_nothing(tmp_path):
    folder = tmp_path / "evaluation"
    first, second, third = swept(0), swept(1), swept(2)
    write_results(folder, *first, {"length.png": b"first"})
    assert write_results(folder, *first, {"length.png": b"first"}) is None
    assert write_results(folder, *second, {"length.png": b"second"}) == folder / "earlier" / "001"
    assert write_results(folder, *third, {"length.png": b"third"}) == folder / "earlier" / "002"
    assert read_result(tmp_path) == third[0]
    for number, (result, *_), plot in (("001", first, b"first"), ("002", second, b"second")):
        kept = folder / "earlier" / number
        assert {path.name for path in kept.iterdir()} == NAMES
        assert json.loads((kept / "length.json").read_text()) == result
        assert (kept / "length.png").read_bytes() == plot


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": 99, "rows": [1], "documents": [1]}'])
def test_a_damaged_result_is_named_and_not_touched(tmp_path, content):
    path = tmp_path / "evaluation" / "length.json"
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(UserError, match=r"length\.json: damaged.*evaluate\.py"):
        read_result(tmp_path)
    assert path.read_text() == content
    write_results(path.parent, *swept(), {"length.png": b"plot"})
    assert (path.parent / "earlier" / "001" / "length.json").read_text() == content


def test_a_missing_result_says_how_to_make_it(tmp_path):
    with pytest.raises(UserError, match=r"not evaluated; write it with: python scripts/evaluate\.py"):
        read_result(tmp_path)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ({}, "evaluation"),
        ({"documents": 3}, "evaluation"),
        ({"path": "books/one, [book].txt"}, "evaluation_one_book"),
        ({"path": "books/"}, "evaluation_books"),
        ({"path": "code/**/*.py"}, "evaluation_code"),
        ({"path": "größe.txt"}, "evaluation_größe"),
        ({"path": "*.*"}, "evaluation_other"),
        ({"name": "pg19"}, "evaluation_pg19"),
        ({"name": "pg19", "path": "copies/of_pg19"}, "evaluation_of_pg19"),
    ],
)
def test_other_data_have_a_folder_that_is_called_after_them(data, name):
    assert evaluation_name(data) == name


def test_rows_may_lack_columns():
    assert csv_of_rows([{"a": 1, "b": None}, {"a": 2, "c": 3}]) == "a,b,c\n1,,\n2,,3\n"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file: the result cannot be written: File exists"):
        write_results(tmp_path / "file", *swept(), {"length.png": b"plot"})
