"""The page: self-contained, escaped, complete."""

import json
import re

import altair as alt
import pytest

from windowlm.evaluation import vega_bundle as bundled
from windowlm.evaluation.html_page import Section, html_page, shown, table
from windowlm.evaluation.length_page import cost_rows, length_sections, settings_of_run
from windowlm.model.config import ModelConfig

from .fakes import ReachModel, one_byte_each, random_documents
from .test_length_sweep import sweep

CHART = alt.Chart(alt.Data(values=[{"x": 1, "y": "</script>"}])).mark_point().encode(x="x:Q", tooltip="y:N")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr("windowlm.evaluation.html_page.vega_bundle", lambda: "BUNDLE")


@pytest.fixture(scope="module")
def result():
    documents = random_documents([200, 60, 90, 120])
    return sweep(ReachModel(11, reach=6), documents, one_byte_each(), lengths=(4, 8, 32))


def test_the_page_loads_nothing_and_holds_no_markup_of_its_content(quick):
    section = Section("<b>title</b>", ["a < b & c"], [CHART, CHART], [{"name": "<i>", "count": 12345}])
    page = html_page("me & you", [section]).decode()
    assert not re.search(r"(src|href)=|https?://|@import|url\(", page)
    assert "<b>title" not in page
    assert "<i>" not in page
    assert "a &lt; b &amp; c" in page
    assert page.count("</script>") == 2
    charts = json.loads(re.search(r'id="charts">(.*)</script>', page).group(1))
    assert list(charts) == re.findall(r'class="chart" id="([\w-]+)"', page) == ["chart-1", "chart-2"]
    assert charts["chart-1"]["width"] == "container"
    assert "<td>12,345</td>" in page


def test_the_bundle_is_kept_and_a_damaged_one_made_anew(tmp_path, monkeypatch):
    made = []
    text = "window.vegaEmbed=1;" + " " * 100_000 + "</script>"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("vl_convert.javascript_bundle", lambda _: made.append(1) or text)
    first = bundled.vega_bundle()
    assert first == bundled.vega_bundle()
    assert "</script>" not in first
    assert len(made) == 1
    (kept,) = (tmp_path / "windowlm").iterdir()
    kept.write_bytes(b"\xff")
    assert bundled.vega_bundle() == first
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept))
    assert bundled.vega_bundle() == first
    assert len(made) == 3


def test_numbers_are_shown_as_readers_want_them():
    values = [None, True, False, 12345, 0.00001234, 2.23456789, 123456.7, "text"]
    assert [shown(v) for v in values] == ["", "yes", "no", "12,345", "1.234e-05", "2.2346", "123,457", "text"]
    assert 'class="text">a' in table([{"a": "a", "b": 1}, {"b": 2}])


def test_the_sections_hold_every_number_of_the_result(quick, result):
    costs = cost_rows(ModelConfig(layers=2, window=8), 11, result, words=100, tokens_per_second=5.0)
    sections = length_sections(result, costs, {"model.window": 8})
    page = html_page("run", sections).decode()
    for row in result["rows"]:
        assert f"<td>{row['bits_per_byte']:.4f}</td>" in page
    assert [len(section.charts) for section in sections] == [2, 1, 0, 0, 0]
    amounts = {row["what"]: row["amount"] for row in costs}
    assert amounts["receptive field, in bytes"] == 15
    # A token is a byte, and each of the scored text's tokens is 100/342 of a word.
    assert amounts["window of 8 tokens, in words"] == round(8 * 100 / result["rows"][0]["targets"])
    assert amounts["KV cache, bytes a token in bfloat16"] * 2 == amounts["KV cache, bytes a token in float32"]
    assert "Equal to 32 within 0.002 bits per byte" in sections[0].sentences[-1]


def test_settings_that_cannot_be_read_are_left_out(tmp_path):
    assert settings_of_run(tmp_path) == {}
    (tmp_path / "config.json").write_text("{")
    assert settings_of_run(tmp_path) == {}
    (tmp_path / "config.json").write_text('{"model": {"window": 4}}')
    assert settings_of_run(tmp_path) == {"model.window": 4}
