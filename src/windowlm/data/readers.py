"""Reads text, JSON lines and parquet, a little at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
from datasets import load_dataset

from windowlm.data.arrow_store import quiet_datasets
from windowlm.data.errors import DataError

_CHUNK_CHARACTERS = 1 << 20
_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class TextFile:
    """Reads UTF-8 text in chunks, every byte as it is: no newline is translated."""

    path: Path

    def __call__(self) -> Iterator[str]:
        """Yield chunks.

        Raises:
            DataError: The file is binary or cannot be read.
        """
        try:
            with self.path.open(encoding="utf-8", newline="") as file:
                while chunk := file.read(_CHUNK_CHARACTERS):
                    if "\0" in chunk:
                        raise DataError(_not_text(self.path, "it holds zero bytes"))
                    yield chunk
        except UnicodeDecodeError as error:
            raise DataError(_not_text(self.path, f"not UTF-8, {error.reason}")) from error
        except OSError as error:
            raise DataError(f"data.path: {str(self.path)!r} is not readable: {error.strerror}") from error


@dataclass(frozen=True)
class InMemory:
    """Gives text that is in memory already."""

    text: str

    def __call__(self) -> Iterable[str]:
        """The text as one chunk."""
        return (self.text,)


def json_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a file with one JSON object a line.

    Raises:
        DataError: A line is not a JSON object, or the file cannot be read.
    """
    number = 0
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise DataError(f"data.path: {str(path)!r} line {number} is not a JSON object")
                    yield row
    except UnicodeDecodeError as error:
        raise DataError(_not_text(path, f"not UTF-8, {error.reason}")) from error
    except json.JSONDecodeError as error:
        raise DataError(f"data.path: {str(path)!r} line {number} is not JSON: {error.msg}") from error
    except OSError as error:
        raise DataError(f"data.path: {str(path)!r} is not readable: {error.strerror}") from error


def parquet_rows(files: str) -> Iterator[dict[str, Any]]:
    """Rows of parquet files, in the order of their names.

    Args:
        files: Path or glob, local or `hf://`.

    Raises:
        DataError: A file is not parquet or cannot be read.
    """
    try:
        with quiet_datasets():
            rows = load_dataset(
                "parquet", data_files=[files], split="train", streaming=True, batch_size=_ROWS_AT_ONCE
            )
            yield from rows
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"data.path: {files!r} is not readable as parquet: {error}") from error


def _not_text(path: Path, reason: str) -> str:
    return (
        f"data.path: {str(path)!r} is binary, not text ({reason}); "
        "convert it to UTF-8, or name the text files alone by a glob such as data.path='folder/**/*.txt'"
    )
