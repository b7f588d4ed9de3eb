"""Reads text, JSON lines and parquet, a little at a time."""

from __future__ import annotations

import gzip
import json
import shlex
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from datasets import load_dataset

from windowlm.data.arrow_store import quiet_datasets
from windowlm.data.errors import DataError

_CHUNK_CHARACTERS = 1 << 20
_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class TextFile:
    """Reads UTF-8 text in chunks, every byte as it is: no newline is translated.

    Where the name ends in ``.gz``, it is the text that gzip made the file of.
    """

    path: Path

    def __call__(self) -> Iterator[str]:
        """Yield chunks.

        Raises:
            DataError: The file is binary or cannot be read.
        """
        with _named_errors(self.path), _open_text(self.path) as file:
            while chunk := file.read(_CHUNK_CHARACTERS):
                if "\0" in chunk:
                    raise DataError(
                        f"data.path: {str(self.path)!r} is binary, not text (it holds zero bytes); name the "
                        "text files alone by a glob such as data.path='folder/**/*.txt'"
                    )
                yield chunk


@dataclass(frozen=True)
class InMemory:
    """Gives text that is in memory already."""

    text: str

    def __call__(self) -> Iterable[str]:
        """The text as one chunk."""
        return (self.text,)


def json_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a file with one JSON object a line, gzip where its name ends so.

    Raises:
        DataError: A line is not a JSON object, or the file cannot be read.
    """
    with _named_errors(path), _open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.removeprefix("\ufeff"))
            except json.JSONDecodeError as error:
                raise DataError(f"data.path: {str(path)!r} line {number} is not JSON: {error.msg}") from error
            if not isinstance(row, dict):
                raise DataError(f"data.path: {str(path)!r} line {number} is not a JSON object")
            yield row


def parquet_rows(files: str) -> Iterator[dict[str, Any]]:
    """Rows of parquet files, in the order of their names.

    Args:
        files: Path or glob, local or `hf://`.

    Raises:
        DataError: A local file is not parquet or cannot be read.
    """
    try:
        with quiet_datasets():
            rows = load_dataset(
                "parquet", data_files=[files], split="train", streaming=True, batch_size=_ROWS_AT_ONCE
            )
            yield from rows
    except (ValueError, OSError) as error:  # pyarrow's errors and those of datasets are of these
        if files.startswith("hf://"):
            raise
        raise DataError(f"data.path: {files!r} is not readable as parquet: {error}") from error


def text_of(row: dict[str, Any], column: str, place: str) -> str:
    """The text of a row.

    Args:
        row: Cells by column.
        column: `data.text_column`.
        place: Where the row stands, for messages.

    Raises:
        DataError: The column is missing or holds something else.
    """
    if column not in row:
        raise DataError(
            f"data.text_column={column}: {place} has the columns {', '.join(map(repr, row))}; give the one "
            "that holds the text"
        )
    text = row[column]
    if not isinstance(text, str):
        raise DataError(
            f"data.text_column={column}: {place} holds {type(text).__name__} there, not text; mend the file "
            "or give another column"
        )
    return text


def _open_text(path: Path) -> TextIO:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Errors of reading as a DataError that names the file and what to do."""
    try:
        yield
    except UnicodeDecodeError as error:
        byte = f"0x{error.object[error.start]:02x}"
        target = path.with_suffix(".utf8.txt")
        raise DataError(
            f"data.path: {str(path)!r} is not UTF-8 text (byte {byte}: {error.reason}); if "
            f"it is text, convert it, for example: iconv -f LATIN1 -t UTF-8 {shlex.quote(str(path))} > "
            f"{shlex.quote(str(target))}"
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"data.path: {str(path)!r} is no whole gzip file, as its name says it is: {error}; copy it "
            "again, or take .gz from its name if it is not compressed"
        ) from error
    except OSError as error:
        raise DataError(f"data.path: {str(path)!r} is not readable: {error.strerror}") from error
