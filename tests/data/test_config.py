"""Settings of the data."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from windowlm.data.config import DataConfig

FILES = sorted((Path(__file__).parents[2] / "conf" / "data").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_yaml_states_every_setting_and_is_valid(file: Path) -> None:
    values = yaml.safe_load(file.read_text())
    assert set(values) == {field.name for field in fields(DataConfig)}
    assert values["name"] == file.stem
    needed = {"path": "a.txt"} if file.stem == "text" else {}
    config = DataConfig(**values | needed)
    changed = {"name", "path", "documents"}
    assert all(
        getattr(config, key) == value for key, value in vars(DataConfig()).items() if key not in changed
    )


def test_every_data_set_has_a_yaml() -> None:
    names = DataConfig.__annotations__["name"].__args__
    assert {file.stem for file in FILES} == set(names)


@pytest.mark.parametrize(
    ("field", "settings"),
    [
        ("documents", {"documents": 0}),
        ("sequence_length", {"sequence_length": 0}),
        ("batch_size", {"batch_size": 0}),
        ("validation_tokens", {"validation_tokens": 1}),
        ("workers", {"workers": -1}),
        ("split_seed", {"split_seed": -1}),
        ("validation_fraction", {"validation_fraction": 0.0}),
        ("test_fraction", {"test_fraction": 0.5}),
        ("path", {"name": "text"}),
        ("path", {"name": "stdlib", "path": "a.txt"}),
        ("revision", {"name": "stdlib", "revision": "main"}),
        ("revision", {"name": "pg19", "revision": "main", "path": "copy"}),
        ("documents", {"name": "fineweb-edu"}),
        ("exclude", {"exclude": ""}),
        ("cache_dir", {"cache_dir": " "}),
        ("text_column", {"text_column": ""}),
    ],
)
def test_a_mistake_names_the_setting_and_a_good_value(field: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^{field}=.*; try {field}="):
        DataConfig(**settings)


def test_the_settings_load_no_heavy_library() -> None:
    code = (
        "import sys, windowlm.data.config, windowlm.tokenization.config;"
        "heavy = {'torch', 'numpy', 'datasets', 'tokenizers', 'lightning', 'pydantic'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
