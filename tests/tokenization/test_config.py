"""Settings of the tokenizer."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from windowlm.tokenization.config import TokenizerConfig

FILES = sorted((Path(__file__).parents[2] / "conf" / "tokenizer").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_yaml_states_every_setting_and_is_valid(file: Path) -> None:
    values = yaml.safe_load(file.read_text())
    assert set(values) == {field.name for field in fields(TokenizerConfig)}
    assert values["kind"] == file.stem
    needed: dict[str, Any] = {"path": "tokenizer.json"} if file.stem in ("file", "folder") else {}
    TokenizerConfig(**values | needed)


@pytest.mark.parametrize(
    ("field", "settings"),
    [
        ("vocabulary_size", {"vocabulary_size": 256}),
        ("training_bytes", {"training_bytes": 0}),
        ("path", {"kind": "file"}),
        ("path", {"kind": "bpe", "path": "tokenizer.json"}),
        ("end_mark", {"end_mark": ""}),
    ],
)
def test_a_mistake_names_the_setting_and_a_good_value(field: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^{field}=.*; try {field}="):
        TokenizerConfig(**settings)
