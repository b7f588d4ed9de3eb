"""Settings as they are written on the command line."""

import pytest

from windowlm.setting_text import flattened, setting_text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (1, "1"),
        (0, "0"),
        ([64, None], "[64,null]"),
        ((0.9, 0.95), "[0.9,0.95]"),
        ("32-true", "32-true"),
        ({"kind": "linear", "factor": 2.0}, "{kind: linear, factor: 2.0}"),
    ],
)
def test_settings_are_written_as_on_the_command_line(value, text):
    assert setting_text(value) == text


def test_nested_settings_have_full_keys():
    settings = {"model": {"window": 64, "rotary": {"base": 1.0}}, "seed": 0, "empty": {}}
    assert flattened(settings) == {"model.window": 64, "model.rotary.base": 1.0, "seed": 0, "empty": {}}
