"""Two runs, and settings over seeds, by everything that was measured of them."""

import csv
import io
import json

import numpy as np
import pytest
from rich.console import Console

from tests.scripts.test_compare_runs import run_folder
from windowlm.errors import UserError
from windowlm.evaluation.bootstrap_t import bootstrap_t
from windowlm.evaluation.comparison import BASE, read_run, runs_in
from windowlm.evaluation.equivalence import equivalence
from windowlm.evaluation.paired_difference import paired_difference
from windowlm.evaluation.seed_variation import setting_difference
from windowlm.study.author_values import FAR_REPEATS, LOSS, RIGHT, author_values
from windowlm.study.measure_comparison import measures_table, paired_measures
from windowlm.study.measure_result import measure_result
from windowlm.study.setting_comparison import AUTHORS, AUTHORS_AND_SEEDS, compare_settings, evaluated_cells
from windowlm.study.setting_report import report_settings

AUTHOR_NAMES = [f"author {number}" for number in range(9)]
FACTS = {"targets_hash": "same", "model": "m", "distances": [256, 512]}


def add_run(path, window, seed, bits_N, far_N=None, saved_N=None, right_N=None, **facts):
    """A run whose authors have one document of 5 bytes each."""
    run_folder(path, window, float(np.mean(bits_N)))
    (path / "config.json").write_text(
        json.dumps({"model": {"window": window}, "seed": seed, "trainer": {"max_time": seed * 1.5}})
    )
    file = path / "evaluation" / "length.json"
    result = json.loads(file.read_text())
    result["documents"] = [
        {"document_hash": f"h{n}", "author": name, "bytes": 5, "nats": {"8": 5 * np.log(2) * bits}}
        for n, (name, bits) in enumerate(zip(AUTHOR_NAMES, bits_N, strict=True))
    ]
    file.write_text(json.dumps(result))
    (path / "evaluation" / "study").mkdir()
    rows = {
        "far_repeats": [
            {"distance_from": low, "distance_to": high, "cluster": name, "bytes": size, "nats": nats}
            for name, far in zip(AUTHOR_NAMES, [] if far_N is None else far_N, strict=False)
            for low, high, size, nats in (
                (256, 512, 10, {"4": 99.0, "8": 10 * far}),
                (512, None, 30, {"4": 99.0, "8": 60 * far}),
            )
        ],
        "pasted_spans": [
            {"span": "random", "distance": 4096, "cluster": name, "saved": saved}
            for name, saved in zip(AUTHOR_NAMES, [] if saved_N is None else saved_N, strict=False)
        ],
        "forced_choice": [
            {"distance": 512, "depth": depth, "cluster": name, "questions": 4, "right": 4 * right}
            for name, right in zip(AUTHOR_NAMES, [] if right_N is None else right_N, strict=False)
            for depth in (0.0, 0.5)
        ],
    }
    for name, clusters in rows.items():
        if clusters:
            measured = measure_result(name, meaning=[], rows=[], clusters=clusters)
            measured["settings"] = FACTS | facts
            (path / "evaluation" / "study" / f"{name}.json").write_text(json.dumps(measured))


def draws(number, scale=0.1):
    return np.random.default_rng(number).normal(1.0, scale, size=len(AUTHOR_NAMES))


def test_two_runs_are_compared_by_what_both_measured(tmp_path):
    far, saved = [draws(1), draws(2)], [draws(3), draws(4)]
    for number in range(2):
        add_run(tmp_path / str(number), 4, number, draws(number), far[number], saved[number])
    found, left_out = paired_measures(*(read_run(tmp_path / name) for name in "01"))
    assert left_out == []
    assert [(pair.figure.measure, pair.figure.group) for pair in found] == [
        (FAR_REPEATS, "all distances"),
        (FAR_REPEATS, "256 to 512 bytes back"),
        (FAR_REPEATS, "from 512 bytes back"),
        ("random span pasted again, nats a byte saved", "4,096 bytes back"),
    ]
    # 70 nats on 40 bytes.
    expected = bootstrap_t(1.75 * (far[1] - far[0]))
    assert found[0].first == pytest.approx(1.75 * far[0].mean())
    assert found[0].difference["mean"] == pytest.approx(expected.mean)
    assert found[0].difference["high"] == pytest.approx(expected.high)
    assert found[3].second == pytest.approx(saved[1].mean())
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(measures_table(found))
    assert "from 512 bytes back" in console.export_text()


def test_right_choices_are_paired_over_authors_at_each_distance(tmp_path):
    right = [draws(1), draws(2)]
    for number in range(2):
        add_run(tmp_path / str(number), 4, number, draws(number), right_N=right[number])
    (pair,), _ = paired_measures(*(read_run(tmp_path / name) for name in "01"))
    assert (pair.figure.measure, pair.figure.group) == (RIGHT, "512 bytes back")
    expected = bootstrap_t(right[1] - right[0])
    found = pair.difference
    assert (found["mean"], found["low"], found["high"]) == pytest.approx(
        (expected.mean, expected.low, expected.high)
    )
    assert found["pairs"] == len(AUTHOR_NAMES)


def test_settings_are_compared_over_authors_and_seeds(tmp_path):
    bits = {(window, seed): draws(10 * seed + window) for window in (4, 8) for seed in (0, 1, 2)}
    for number, ((window, seed), values) in enumerate(bits.items()):
        add_run(tmp_path / str(number), window, seed, values, far_N=values + 1)
    cells = evaluated_cells(runs_in(tmp_path))
    assert {name: len(runs) for name, runs in cells.items()} == {BASE: 3, "model.window=8": 3}
    claims = compare_settings(cells, BASE)
    one, two = ([bits[window, seed] for seed in (0, 1, 2)] for window in (4, 8))
    expected = setting_difference(one, two)
    assert claims[0].figure.measure == LOSS
    found = claims[0]
    assert (found.difference, found.low, found.high) == pytest.approx(
        (expected.mean, expected.low, expected.high)
    )
    assert (found.over, found.seeds, found.authors) == (AUTHORS_AND_SEEDS, (3, 3), 9)
    assert found.p == found.p_holm
    assert (found.p < 0.05) == (not expected.low <= 0 <= expected.high)
    assert found.equal is False
    far = [claim for claim in claims if claim.figure.measure == FAR_REPEATS]
    assert [claim.p_holm >= claim.p for claim in far] == [True] * 3
    assert all(claim.equal is None for claim in far)


def test_a_single_seed_speaks_of_its_models_alone(tmp_path):
    values = [draws(1), draws(1) + 1e-4 * draws(2), draws(3)]
    for number, window in enumerate((4, 8, 16)):
        add_run(tmp_path / str(number), window, 0, values[number], saved_N=values[number])
    claims = compare_settings(evaluated_cells(runs_in(tmp_path)), BASE)
    assert {claim.over for claim in claims} == {AUTHORS}
    assert all(claim.p is None for claim in claims)
    losses = [claim for claim in claims if claim.figure.measure == LOSS]
    alone = paired_difference(values[0], values[2])
    assert (losses[1].low, losses[1].high) == pytest.approx((alone.low, alone.high))
    assert [claim.equal for claim in losses] == [True, equivalence(values[2] - values[0]).equivalent]
    skewed = bootstrap_t(values[2] - values[0])
    assert claims[-1].low == pytest.approx(skewed.low)


def test_the_report_is_written_with_every_claim(tmp_path):
    for number, (window, seed) in enumerate([(4, 0), (8, 0), (4, 1), (8, 1)]):
        add_run(tmp_path / str(number), window, seed, draws(number), far_N=draws(number))
    console = Console(width=160, record=True, file=io.StringIO())
    files = report_settings(tmp_path, console, facts={"command": "c"})
    text = console.export_text()
    assert "model.window=8" in text
    assert LOSS in text
    rows = list(csv.DictReader(files[0].open()))
    content = json.loads(files[1].read_text())
    assert len(rows) == len(content["claims"]) == 4
    assert content["command"] == "c"
    assert content["runs"]["model.window=8"] == [str(tmp_path / "1"), str(tmp_path / "3")]
    turned = report_settings(tmp_path, console, base="model.window=8")
    (there,) = [row for row in json.loads(turned[1].read_text())["claims"] if row["measure"] == LOSS]
    (here,) = [row for row in content["claims"] if row["measure"] == LOSS]
    assert there["difference"] == pytest.approx(-here["difference"])


def test_measures_of_other_authors_are_not_compared_and_earlier_ones_do_not_tell(tmp_path):
    for name, facts in (("0", {"clusters_hash": "a"}), ("1", {"clusters_hash": "b"}), ("2", {})):
        add_run(tmp_path / name, 4, 0, draws(0), far_N=draws(0), **facts)
    pairs, (said,) = paired_measures(read_run(tmp_path / "0"), read_run(tmp_path / "1"))
    assert pairs == []
    assert "far_repeats is left out: it was measured with different clusters_hash" in said
    for first, second in ("02", "20"):
        pairs, left_out = paired_measures(read_run(tmp_path / first), read_run(tmp_path / second))
        assert pairs
        assert left_out == []


def test_a_measure_that_was_made_differently_is_left_out_and_others_are_compared(tmp_path):
    for number, distances in enumerate(([1], [2])):
        folder = tmp_path / str(number)
        add_run(folder, 4, number, draws(number), draws(number), draws(number))
        file = folder / "evaluation" / "study" / "pasted_spans.json"
        measured = json.loads(file.read_text())
        measured["settings"]["distances"] = distances
        file.write_text(json.dumps(measured))
    for order in ("01", "10"):
        pairs, (said,) = paired_measures(*(read_run(tmp_path / name) for name in order))
        assert {pair.figure.measure for pair in pairs} == {FAR_REPEATS}
        assert said.startswith("pasted_spans is left out: it was measured with different distances")


def test_what_cannot_be_compared_is_said(tmp_path):
    console = Console(file=io.StringIO())
    add_run(tmp_path / "0", 4, 0, draws(0), far_N=draws(0))
    with pytest.raises(UserError, match="one setting, and a comparison needs two"):
        report_settings(tmp_path, console)
    add_run(tmp_path / "1", 8, 0, draws(0), far_N=draws(0), distances=[1, 2])
    with pytest.raises(UserError, match="far_repeats was measured with different distances"):
        report_settings(tmp_path, console)
    with pytest.raises(UserError, match=r"there is no such setting; there are: \(base\); model.window=8"):
        report_settings(tmp_path, console, base="x")
    add_run(tmp_path / "2", 8, 0, draws(0))
    with pytest.raises(UserError, match="two runs have the same seed"):
        report_settings(tmp_path, console)
    (tmp_path / "1" / "evaluation" / "length.json").unlink()
    file = tmp_path / "2" / "evaluation" / "length.json"
    file.write_text(file.read_text().replace('"same"', '"other"'))
    with pytest.raises(UserError, match="scored different text"):
        report_settings(tmp_path, console)
    for number in range(3):
        (tmp_path / str(number) / "run.json").write_text("{}")
        (tmp_path / str(number) / "evaluation" / "length.json").unlink(missing_ok=True)
    with pytest.raises(UserError, match="none of 3 runs is evaluated"):
        report_settings(tmp_path, console)


def test_measures_of_an_earlier_evaluation_do_not_count(tmp_path):
    add_run(tmp_path, 4, 0, draws(0), far_N=draws(0), targets_hash="old")
    assert {figure.measure for figure in author_values(read_run(tmp_path)).values} == {LOSS}


def test_measures_of_other_weights_do_not_count(tmp_path):
    add_run(tmp_path, 4, 0, draws(0), far_N=draws(0), model="these")
    file = tmp_path / "evaluation" / "length.json"
    result = json.loads(file.read_text())
    for weights, counts in (("these", True), ("others", False)):
        file.write_text(json.dumps(result | {"weights": weights}))
        assert (
            FAR_REPEATS in {figure.measure for figure in author_values(read_run(tmp_path)).values}
        ) == counts
