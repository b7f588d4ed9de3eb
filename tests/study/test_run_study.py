"""Measures of a finished run, from the command's settings to the files and the page."""

import csv
import html
import json

import numpy as np
import pytest
import vl_convert

from tests.evaluation.test_evaluate import run  # noqa: F401
from windowlm.config import ConfigError, EvaluateConfig, check_config
from windowlm.errors import UserError
from windowlm.evaluation.config import EvaluationConfig
from windowlm.evaluation.evaluate import evaluate_checkpoint
from windowlm.study.config import StudyConfig
from windowlm.study.measure_charts import TITLES, measure_charts
from windowlm.study.measure_files import measures_in, read_measure
from windowlm.study.run_study import SETTINGS, check_measures, run_study

ALL = [name for name in SETTINGS if name != "key_words"]
SMALL = {"distances": [32, 64, 120], "span": 32, "window": 200, "places": 1, "depths": [0.0, 0.5], "block": 4}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Bundling and drawing take seconds and have tests of their own."""
    monkeypatch.setattr("windowlm.evaluation.html_page.vega_bundle", lambda: "BUNDLE")
    monkeypatch.setattr("windowlm.evaluation.evaluate.length_plot", lambda _: b"plot")
    monkeypatch.setattr("windowlm.study.measure_files.png", lambda _: b"plot")


def evaluated(folder, lengths=(4, 8, 16)):
    evaluation = EvaluationConfig(context_lengths=list(lengths))
    return evaluate_checkpoint(folder, data={}, evaluation=evaluation, device="cpu")


def test_every_measure_is_made_written_and_shown(run):  # noqa: F811
    results = run_study(evaluated(run), StudyConfig(measures=ALL, **SMALL))
    assert [result["measure"] for result in results] == ALL
    folder = run / "evaluation" / "study"
    page = (run / "evaluation" / "report.html").read_text()
    for result in results:
        assert json.loads((folder / f"{result['measure']}.json").read_text()) == result
        assert len(list(csv.DictReader((folder / f"{result['measure']}.csv").open()))) == len(result["rows"])
        assert html.escape(TITLES[result["measure"]]) in page
        assert all(html.escape(sentence) in page for sentence in result["meaning"])
        assert bool(measure_charts(result)) == (folder / f"{result['measure']}.png").exists()
        for chart in measure_charts(result):
            assert vl_convert.vegalite_to_svg(chart.to_dict()).startswith("<svg")
    by_name = {result["measure"]: result for result in results}
    assert by_name["reach"]["meaning"] == ["Measured and computed reach agree: 7 tokens."]
    assert by_name["reach"]["rows"][0]["tokens_probed"] == 71
    assert "Loss by context length" in page


def test_an_interrupted_study_goes_on_and_other_settings_keep_the_earlier_result(run, capsys):  # noqa: F811
    first = evaluated(run)
    run_study(first, StudyConfig(measures=["useful_reach"]))
    made = run / "evaluation" / "study" / "useful_reach.json"
    stamp = made.stat().st_mtime_ns
    run_study(first, StudyConfig(measures=["useful_reach", "pasted_spans"], **SMALL))
    assert made.stat().st_mtime_ns == stamp
    assert "made already" in capsys.readouterr().err
    spans = read_measure(run / "evaluation", "pasted_spans")
    run_study(first, StudyConfig(measures=["pasted_spans"], **{**SMALL, "seed": 1}))
    kept = run / "evaluation" / "study" / "earlier" / "001" / "pasted_spans.json"
    assert json.loads(kept.read_text()) == spans
    assert read_measure(run / "evaluation", "pasted_spans") != spans
    assert len(measures_in(run / "evaluation")) == 2


def test_measures_of_other_authors_are_made_again(run, tmp_path, capsys):  # noqa: F811
    draw = np.random.default_rng(0)
    rows = [
        {
            "text": " ".join(draw.choice(["window", "of", "text"], size=60)),
            "one": f"a{n}",
            "two": f"b{n // 2}",
        }
        for n in range(4)
    ]
    (tmp_path / "books.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = []
    for column in ("one", "one", "two"):
        data = {
            "path": str(tmp_path / "books.jsonl"),
            "author_column": column,
            "cache_dir": str(tmp_path / "cache"),
        }
        evaluation = EvaluationConfig(context_lengths=[4, 8])
        scored = evaluate_checkpoint(run, data=data, evaluation=evaluation, device="cpu")
        found += run_study(scored, StudyConfig(measures=["pasted_spans"], **SMALL))
        assert ("made already" in capsys.readouterr().err) == (len(found) == 2)
    assert found[0] == found[1]
    assert {row["cluster"] for row in found[2]["clusters"]} == {"b0", "b1"}


def test_the_text_around_a_span_is_recorded_as_long_as_it_was(run):  # noqa: F811
    scored = evaluated(run)
    small = {**SMALL, "window": None, "distances": [32, 40], "span": 32}
    (result,) = run_study(scored, StudyConfig(measures=["pasted_spans"], **small))
    assert result["settings"]["window"] == 32


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 99}'])
def test_a_damaged_measure_is_named_and_left_as_it_is(run, content):  # noqa: F811
    path = run / "evaluation" / "study" / "reach.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(UserError, match=r"reach\.json: damaged.*nothing was overwritten"):
        run_study(evaluated(run), StudyConfig(measures=["useful_reach"]))
    assert path.read_text() == content
    assert not path.with_name("useful_reach.json").exists()


def test_measures_of_other_lengths_are_not_on_the_page(run):  # noqa: F811
    run_study(evaluated(run), StudyConfig(measures=["useful_reach"]))
    run_study(evaluated(run, (4, 16)), StudyConfig())
    assert TITLES["useful_reach"] not in (run / "evaluation" / "report.html").read_text()


def test_choosers_must_be_scored_runs_and_others_than_the_measured_one(run, tmp_path):  # noqa: F811
    with pytest.raises(UserError, match=r"^study\.choosers=.*none: there is no such folder"):
        check_measures(run, StudyConfig(measures=["key_words"], choosers=[str(tmp_path / "none")]))
    scored = evaluated(run)
    for chooser, message in (
        (tmp_path, r"losses\.parquet: there is no such file"),
        (run, "may not choose its own key words"),
    ):
        with pytest.raises(UserError, match=message):
            run_study(scored, StudyConfig(measures=["key_words"], choosers=[str(chooser)]))


def test_rare_words_of_an_unknown_training_are_refused_before_anything_is_scored(run, tmp_path):  # noqa: F811
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "config.json").write_text('{"model_type": "llama"}')
    check_measures(theirs, StudyConfig(measures=["reach"]))
    check_measures(run, StudyConfig(measures=["far_repeats"]))
    with pytest.raises(UserError, match=r"^study\.measures: far_repeats .*leave far_repeats away$"):
        check_measures(theirs, StudyConfig(measures=["reach", "far_repeats"]))


def test_near_context_must_be_shorter_than_the_longest(run):  # noqa: F811
    with pytest.raises(
        UserError, match=r"^study\.near=16: .*below the longest context length within the training, 16"
    ):
        run_study(evaluated(run), StudyConfig(measures=["far_context"], near=16))


def test_a_far_context_that_cannot_matter_or_is_beyond_the_training_is_said(run):  # noqa: F811
    (found,) = run_study(evaluated(run), StudyConfig(measures=["far_context"], near=8, block=2))
    assert "The near context of 8 tokens is all that this model sees, 7" in found["left_out"][0]
    (found,) = run_study(evaluated(run), StudyConfig(measures=["far_context"], near=4, block=2))
    assert found["left_out"] == []
    scored = evaluated(run, (4, 8, 16))
    for row in scored.result["rows"]:
        row["extrapolation"] = row["context_length"] > 4
    with pytest.raises(UserError, match=r"below the longest context length within the training, 4"):
        run_study(scored, StudyConfig(measures=["far_context"], near=8))
    scored.result["training_length"] = 12
    for row in scored.result["rows"]:
        row["extrapolation"] = row["context_length"] > 2
    (found,) = run_study(scored, StudyConfig(measures=["far_context"], near=4, block=2, seed=1))
    assert "Windows of 32 tokens are longer than those of its training, 12" in found["left_out"][-1]


@pytest.mark.parametrize(
    ("study", "key", "correction"),
    [
        ({"measures": ["reach", "reach"]}, "study.measures", "study.measures=[reach]"),
        ({"measures": ["dreams"]}, "study.measures", None),
        ({"measures": ["key_words"]}, "study.choosers", "study.choosers=[RUN_DIR]"),
        ({"choosers": ["x"]}, "study.choosers", "study.choosers=[RUN_DIR]"),
        ({"distances": [512, 256]}, "study.distances", "study.distances=[256,512]"),
        ({"distances": [512]}, "study.distances", None),
        ({"depths": [1.0]}, "study.depths", "study.depths=[0.0,0.5]"),
        ({"threshold": 0.0}, "study.threshold", "study.threshold=2.0"),
        ({"span": 16}, "study.span", "study.span=256"),
        ({"window": 0}, "study.window", "study.window=8192"),
        ({"near": -1}, "study.near", "study.near=512"),
        ({"places": 0}, "study.places", "study.places=2"),
        ({"seed": -1}, "study.seed", "study.seed=0"),
    ],
)
def test_a_wrong_setting_is_named_with_one_that_would_do(study, key, correction):
    with pytest.raises(ConfigError) as raised:
        check_config(EvaluateConfig, {"checkpoint": "run", "study": study})
    assert raised.value.key == key
    if correction is not None:
        assert raised.value.correction == correction
