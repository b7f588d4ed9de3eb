"""Table and plot of a result."""

import struct

import altair as alt
import pytest
from rich.console import Console

from windowlm.evaluation.config import EvaluationConfig
from windowlm.evaluation.length_sweep import length_sweep
from windowlm.evaluation.report import _in_xml, caption, length_plot, length_table, png, window_text

from .fakes import ReachModel, one_byte_each, random_documents
from .test_length_sweep import FACTS


def result_of(lengths=(4, 32), documents=(100, 70, 8)):
    evaluation = EvaluationConfig(context_lengths=list(lengths))
    return length_sweep(
        ReachModel(11, reach=20), random_documents(documents), one_byte_each(), evaluation, FACTS
    )[0]


def printed(table):
    console = Console(width=100)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_characters_that_xml_cannot_hold_do_not_end_the_process():
    values = [{"name": "a\0b\x01c\x0b\ud800\ufffe\uffff\t漢", "y": 1.0}]
    chart = alt.Chart(alt.Data(values=values), title="a\x1f").mark_bar().encode(x="name:N", y="y:Q")
    assert png(chart).startswith(b"\x89PNG")
    found = _in_xml({"title\0": ["a\x1f", 1.0, None], "kept": "a\t\r\n\x7f漢\U0001fffe"})
    assert found == {
        "title\N{REPLACEMENT CHARACTER}": ["a\N{REPLACEMENT CHARACTER}", 1.0, None],
        "kept": "a\t\r\n\x7f漢\U0001fffe",
    }


def test_the_table_shows_every_length_with_its_change_and_marks_extrapolation():
    result = result_of()
    text = printed(length_table(result))
    short, long = result["rows"]
    assert f"{short['perplexity']:.3f}" in text
    assert f"{long['bits_per_byte']:.4f}" in text
    assert f"{long['naive_bits_per_byte']:.4f}" in text
    change = long["change_from_shortest"]
    assert f"{change['mean']:+.4f} ± {change['high'] - change['mean']:.4f}" in text
    assert "32*" in text
    assert "4*" not in text
    words = " ".join(text.split())
    assert "1 documents are too short" in words
    undecided = result["paired"]["low"] <= 0 <= result["paired"]["high"]
    assert ("Whether c = 32 differs from c = 4 cannot be told" in words) == undecided
    assert "naive: the same targets in windows of c tokens" in words
    assert "the mean of the documents, each counted once" in words


@pytest.mark.parametrize(("low", "high", "told"), [(-0.2, -0.1, True), (-0.2, 0.1, False), (0.1, 0.2, True)])
def test_an_interval_that_holds_zero_is_named(low, high, told):
    result = result_of()
    result["paired"] |= {"low": low, "high": high}
    assert ("cannot be told" in caption(result)) != told


def test_a_single_document_has_a_change_without_interval():
    result = result_of(documents=(100,))
    text = printed(length_table(result))
    assert f"{result['rows'][1]['change_from_shortest']['mean']:+.4f}" in text
    assert "0 ±" not in text


@pytest.mark.parametrize("settings", [{}, {"lengths": [8]}, {"documents": [100]}])
def test_the_plot_is_a_png_of_print_resolution(settings):
    image = length_plot(result_of(**settings))
    assert image.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", image[16:24])
    assert width > 1000
    assert height > 700


@pytest.mark.parametrize(
    ("window", "reach", "text"),
    [
        (None, None, "window full"),
        (64, 253, "window 64, receptive field 253"),
        ([64, None], None, "window 64 full"),
    ],
)
def test_windows_are_said_in_words(window, reach, text):
    assert window_text({"window": window, "receptive_field": reach}) == text
