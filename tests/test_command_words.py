"""Words of a command line."""

import pytest

from windowlm.command_words import corrected


@pytest.mark.parametrize(
    ("words", "key", "correction", "expected"),
    [
        (["-m", "a=1,3", "b=2"], "a", "a=1,2", ["-m", "a=1,2", "b=2"]),
        (["a=1", "b=2", "+a=3"], "a", "a=2", ["b=2", "a=2"]),
        (["windw=1", "window=2", "b=3"], "windw", "window=1", ["window=1", "b=3"]),
        (["b=3"], "a", "a=2", ["b=3", "a=2"]),
        (["a=1", "-m"], "a", "a=2", ["a=2", "-m"]),
    ],
)
def test_a_wrong_word_is_replaced_where_it_stands(words, key, correction, expected):
    assert corrected(words, key, correction) == expected
