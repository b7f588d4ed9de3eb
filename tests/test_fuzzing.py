"""Drawn settings, words and files: each is taken or refused with a message; none ends in another error.

The long form: python -m pytest -n 2 tests/test_fuzzing.py --hypothesis-profile=long
The same with a record of what was drawn: python -m tests.fuzzing
"""

import gzip
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from windowlm.command_words import for_hydra
from windowlm.config import ConfigError, EvaluateConfig, TrainConfig, check_config, settings_of
from windowlm.data.config import DataConfig
from windowlm.data.errors import DataError
from windowlm.data.sources import find_source
from windowlm.errors import UserError
from windowlm.training.metrics_log import MetricsLog

KEYS = {kind: sorted(settings_of(kind)) for kind in (TrainConfig, EvaluateConfig)}
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["auto", "null", "_target_", "${seed}", "../..", "\0", "16-mixed", "bpe", "text"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def nested(key: str, value: Any) -> dict[str, Any]:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value  # type: ignore[no-any-return]


@given(kind=st.sampled_from([TrainConfig, EvaluateConfig]), data=st.data(), value=VALUES)
def test_a_drawn_value_is_taken_or_refused(kind: type, data: st.DataObject, value: Any) -> None:
    key = data.draw(st.sampled_from(KEYS[kind]))
    try:
        check_config(kind, nested(key, value))
    except ConfigError as error:
        assert str(error)


@given(word=st.text(max_size=40), sweep=st.booleans())
def test_a_drawn_word_is_taken_or_refused(word: str, sweep: bool) -> None:
    try:
        for_hydra(word, settings_of(TrainConfig), sweep=sweep, sparse=False)
    except ConfigError as error:
        assert str(error)


CONTENTS = (
    st.binary(max_size=400)
    | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | st.lists(VALUES, max_size=4).map(lambda rows: "\n".join(map(json.dumps, rows)).encode())
    | st.lists(st.fixed_dictionaries({"text": VALUES}), max_size=4).map(
        lambda rows: "\n".join(map(json.dumps, rows)).encode()
    )
    | st.binary(max_size=300).map(gzip.compress)
    | st.binary(max_size=100).map(lambda content: b"PAR1" + content + b"PAR1")
)
ENDINGS = st.sampled_from([".txt", ".md", ".jsonl", ".txt.gz", ".jsonl.gz", ".parquet", ".py"])


@given(content=CONTENTS, ending=ENDINGS)
def test_a_drawn_file_is_read_or_refused_by_name(content: bytes, ending: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"drawn{ending}")
        path.write_bytes(content)
        try:
            source = find_source(DataConfig(name="text", path=str(path)))
            read = ["".join(document.read()) for document in source.documents()]
        except DataError as error:
            assert "drawn" in str(error)
            return
        if ending == ".txt":
            assert "".join(read).encode() == content


@given(content=st.binary(max_size=300))
def test_drawn_metrics_are_read_or_refused_by_name(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "metrics.jsonl")
        path.write_bytes(content)
        try:
            rows = MetricsLog(path).rows()
        except UserError as error:
            assert "metrics.jsonl" in str(error)
        else:
            assert all(isinstance(row["step"], int) for row in rows)


def test_a_mark_of_byte_order_line_ends_and_a_long_line_are_text(tmp_path: Path) -> None:
    line = "a long line of words " * 200_000
    for name, text in (
        ("mark.txt", "\ufeffsome words"),
        ("ends.txt", "one\r\ntwo\rthree\n"),
        ("line.txt", line),
    ):
        path = tmp_path / name
        path.write_bytes(text.encode("utf-8"))
        (document,) = find_source(DataConfig(name="text", path=str(path))).documents()
        assert "".join(document.read()) == text
    path = tmp_path / "line.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"text": line}).encode() + b"\r\n")
    (document,) = find_source(DataConfig(name="text", path=str(path))).documents()
    assert "".join(document.read()) == line


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".txt.gz"])
def test_a_line_of_200_megabytes_is_text(ending: str, tmp_path: Path) -> None:
    piece = b"a long line of words " * 50_000
    pieces = 200_000_000 // len(piece) + 1
    path = tmp_path / f"line{ending}"
    before, after = (b'{"text": "', b'"}\n') if ending == ".jsonl" else (b"", b"")
    # Not compressed: so many equal words would be refused as a bomb.
    with gzip.open(path, "wb", compresslevel=0) if ending == ".txt.gz" else path.open("wb") as file:
        file.write(before)
        for _ in range(pieces):
            file.write(piece)
        file.write(after)
    expected, found = hashlib.sha256(piece * pieces).digest(), hashlib.sha256()
    (document,) = find_source(DataConfig(name="text", path=str(path))).documents()
    for chunk in document.read():
        found.update(chunk.encode())
    assert found.digest() == expected
