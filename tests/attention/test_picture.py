"""What the pictures show is what the definition says, in the terminal, in charts and in docstrings."""

import doctest
import json
import re
from typing import Any

import pytest
import torch
import vl_convert

from windowlm.attention import layers, picture, window
from windowlm.attention.picture import AttentionPicture
from windowlm.attention.window import Visibility

CPU = torch.device("cpu")


def marks(drawn: AttentionPicture) -> list[str]:
    """Rows of marks of the only panel, without spaces."""
    (panel,) = drawn.panels()
    return ["".join(row) for row in panel.rows]


def test_the_drawing_in_the_docstring_is_what_is_drawn() -> None:
    assert doctest.testmod(picture) == (0, 1)


def test_the_drawings_of_other_docstrings_are_the_masks() -> None:
    def drawn(docstring: str | None) -> list[str]:
        return re.findall(r"^ {4,}([01](?: | {4}|[01])*[01])$", docstring or "", re.MULTILINE)

    def rows(queries: int, keys: int, **settings: Any) -> list[str]:
        mask = Visibility.build(**settings).mask(queries, keys, CPU)[0]
        return [" ".join(map(str, row)) for row in mask.int().tolist()]

    def beside(*masks: list[str]) -> list[str]:
        return ["    ".join(row) for row in zip(*masks, strict=True)]

    assert drawn(window.__doc__) == beside(rows(6, 6, window=3), rows(6, 6, window=3, causal=False))
    assert drawn(layers.SlidingWindowAttention.__doc__) == rows(4, 4, window=2)
    documents_BT = torch.tensor([[0, 0, 0, 0, 1, 1]])
    packed = rows(6, 6, window=2, documents_BT=documents_BT)
    with_sink = rows(6, 6, window=2, documents_BT=documents_BT, sinks=1)
    last = rows(2, 6, window=2)
    assert drawn(Visibility.__doc__) == beside(packed[:4], with_sink[:4]) + beside(
        packed[4:], with_sink[4:], last
    )


def test_sinks_are_told_from_the_window() -> None:
    assert marks(AttentionPicture(window=2, sequence_length=5, sinks=1)) == [
        "1····",
        "11···",
        "s11··",
        "s·11·",
        "s··11",
    ]


def test_padding_is_blank_and_documents_do_not_see_each_other() -> None:
    drawn = AttentionPicture(
        window=None, sequence_length=6, documents=[2, 2], padding_left=1, padding_right=1, causal=False
    )
    assert marks(drawn) == ["      ", " 11·· ", " 11·· ", " ··11 ", " ··11 ", "      "]


def test_a_window_and_sinks_of_any_size_are_drawn() -> None:
    assert marks(AttentionPicture(window=10**30, sequence_length=2)) == ["1·", "11"]
    assert marks(AttentionPicture(window=10**30, sequence_length=2, causal=False)) == ["11", "11"]
    assert marks(AttentionPicture(window=1, sequence_length=2, sinks=10**30)) == ["1·", "s1"]


def test_queries_are_the_last_of_more_keys() -> None:
    assert marks(AttentionPicture(window=3, sequence_length=2, keys=5)) == ["·111·", "··111"]


def test_a_pattern_has_one_panel_for_each_window() -> None:
    drawn = AttentionPicture(window=[3, 3, None])
    assert [panel.title for panel in drawn.panels()] == [
        "window 3, layers 1, 2 of 3",
        "no window, layer 3 of 3",
    ]
    assert drawn.panels()[0].visible == [1, 2, *[3] * 10]
    assert len(drawn.chart().to_dict()["hconcat"]) == 2


def test_the_chart_holds_a_cell_for_each_pair_that_is_not_padding() -> None:
    drawn = AttentionPicture(window=2, sequence_length=5, documents=[1, 3], padding_left=1, sinks=1)
    pattern = r'"key: (\d); query: (\d); shows: ([\w ]+)" .+? opacity="([\d.]+)"/>'
    cells = re.findall(pattern, vl_convert.vegalite_to_svg(drawn.chart().to_dict()))
    assert len(cells) == 16
    shown = {(int(query), int(key)): (shows, opacity) for key, query, shows, opacity in cells}
    assert shown[1, 1] == ("document A", "1")
    assert shown[4, 4] == ("document B", "1")
    assert shown[4, 2] == ("document B", "0.5")
    assert shown[2, 1] == ("hidden", "1")


def test_the_chart_of_the_longest_sequence_is_as_small_as_its_rows() -> None:
    drawn = AttentionPicture(window=64, sequence_length=512)
    assert len(json.dumps(drawn.chart().to_dict(), ensure_ascii=False)) < 512 * 700


def test_documents_are_coloured_in_the_terminal() -> None:
    text = AttentionPicture(window=2, sequence_length=4, documents=[2, 2]).text()
    styles = {text.plain[span.start] for span in text.spans if span.style == picture.COLORS[1]}
    assert styles == {"B", "1", "\n"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 0}, "window=0: .*; try window=4$"),
        ({"window": []}, r"window=\[\]: .*; try window=4$"),
        ({"window": [2, -1]}, r"window=\[2, -1\]: "),
        ({"sequence_length": 0}, "sequence_length=0: from 1 to 512"),
        ({"documents": [5, 8]}, r"sequence_length=12: 13, .* documents=\[5,8\] .*; try sequence_length=13$"),
        ({"documents": [5, 8], "keys": 12}, r"documents=\[5,8\]: .* sum to 12, .*; try documents=\[6,6\]$"),
        ({"documents": [12, 0]}, r"documents=\[12,0\]: lengths from 1 on"),
        ({"padding_left": 7, "padding_right": 6}, "padding_left=7: with padding_right=6 it is more"),
        ({"sinks": -1}, "sinks=-1: a whole number, at least 0"),
        ({"keys": 11}, "keys=11: at least sequence_length=12"),
        *(({"window": given}, f"window={given!r}: ") for given in (True, 2.5, "4")),
        ({"window": [2, 2.5]}, r"window=\[2, 2.5\]: "),
        *(({"sinks": given}, f"sinks={given!r}: a whole number") for given in (True, 1.5, None)),
        *(({"sequence_length": given}, f"sequence_length={given!r}: .*=12$") for given in (True, 4.0, None)),
        ({"keys": 12.0}, "keys=12.0: a whole number is allowed; try keys=null$"),
        ({"causal": "no"}, "causal='no': true or false is allowed; try causal=true$"),
        ({"documents": [5.0, 7.0]}, r"documents=\[5.0, 7.0\]: a list of whole numbers"),
        ({"documents": 12}, "documents=12: a list of whole numbers"),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionPicture(**settings)
