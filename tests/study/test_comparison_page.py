"""The page over many runs."""

import json
import re

import pytest

from tests.scripts.test_compare_runs import run_folder
from windowlm.errors import UserError
from windowlm.study.comparison_page import pareto_front, write_comparison_page
from windowlm.study.measure_result import measure_result

MODEL = {"layers": 2, "dim": 16, "heads": 2, "kv_heads": 1, "head_dim": 8, "feed_forward_dim": 24}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("windowlm.evaluation.html_page.vega_bundle", lambda: "BUNDLE")


def add_model(path, window):
    (path / "model").mkdir()
    content = {"model": MODEL | {"window": window}, "vocabulary_size": 256}
    (path / "model" / "config.json").write_text(json.dumps(content))


def add_far_repeats(path, nats):
    rows = [
        {"context_length": c, "distance_from": low, "nats": nats * size / c, "bytes": size}
        for c in (4, 8)
        for low, size in ((256, 10), (512, 30))
    ]
    (path / "evaluation" / "study").mkdir()
    result = measure_result("far_repeats", meaning=[], rows=rows)
    result["settings"] = {"targets_hash": "same"}
    (path / "evaluation" / "study" / "far_repeats.json").write_text(json.dumps(result))


def test_the_front_is_what_no_other_beats():
    points = [(1, 5), (2, 3), (2, 4), (3, 3), (4, 1), (1, 5)]
    assert pareto_front(points) == [True, True, False, False, True, True]
    assert pareto_front([]) == []


def test_the_page_plots_loss_and_far_repeats_against_cost(tmp_path):
    for number, (window, bits) in enumerate([(4, 1.5), (8, 1.25), (None, 1.3)]):
        run_folder(tmp_path / str(number), window, bits)
        add_model(tmp_path / str(number), window)
        add_far_repeats(tmp_path / str(number), 8.0 * number)
    page = write_comparison_page(tmp_path).read_text()
    charts = json.loads(re.search(r'id="charts">(.*)</script>', page).group(1))
    assert len(charts) == 4
    points = [
        value
        for layer in charts["chart-3"]["layer"]
        for value in layer["data"]["values"]
        if layer["mark"]["type"] == "point"
    ]
    # 2 tensors of 8 numbers of 2 bytes, for 4, 8 and all 16 tokens of 2 layers.
    assert [point["cost"] for point in points] == [32 * 2 * tokens for tokens in (4, 8, 16)]
    assert [point["loss"] for point in points] == [0.0, 1.0, 2.0]
    assert [point["front"] for point in points] == [True, False, False]


def test_runs_without_a_model_have_a_row_and_no_point(tmp_path):
    run_folder(tmp_path / "0", 4, 1.5)
    page = write_comparison_page(tmp_path, "evaluation").read_text()
    assert 'id="charts">{}</script>' in page
    assert "<td>1.5000</td>" in page


def test_a_damaged_measure_is_named(tmp_path):
    run_folder(tmp_path / "0", 4, 1.5)
    add_far_repeats(tmp_path / "0", 1.0)
    (tmp_path / "0" / "evaluation" / "study" / "far_repeats.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        write_comparison_page(tmp_path)
