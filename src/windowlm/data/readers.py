"""Reads text, JSON lines and parquet, a little at a time."""

from __future__ import annotations

import glob
import gzip
import io
import os
import shlex
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import pyarrow.parquet
from datasets import load_dataset

from windowlm.data.arrow_store import quiet_datasets
from windowlm.data.errors import DataError
from windowlm.json_text import parse_json

_CHUNK_CHARACTERS = 1 << 20
_ROWS_AT_ONCE = 64
# Text shrinks to a fifth or so; what unpacks to more than this is not text, but may fill memory and disk.
_MOST_UNPACKED = 200
_ALWAYS_UNPACKED_BYTES = 64 << 20


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
                row = parse_json(line.removeprefix("\ufeff"))
            except ValueError as error:
                raise DataError(
                    f"data.path: {str(path)!r} line {number} is not JSON: {getattr(error, 'msg', error)}"
                ) from error
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
        if not files.startswith("hf://"):
            for path in glob.glob(files):
                _refuse_parquet_bomb(path)
        with quiet_datasets():
            rows = load_dataset(
                "parquet", data_files=[files], split="train", streaming=True, batch_size=_ROWS_AT_ONCE
            )
            yield from rows
    except DataError:
        raise
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
        return io.TextIOWrapper(_BoundedGzip(path), encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")


class _BoundedGzip(gzip.GzipFile):
    """A gzip file that is refused once it holds far more than text packs into one of its size."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "rb")
        self._path = path
        self._most = max(_ALWAYS_UNPACKED_BYTES, _MOST_UNPACKED * path.stat().st_size)

    def read1(self, size: int = -1) -> bytes:
        """Some bytes.

        Raises:
            DataError: the file unpacks to too much.
        """
        content = super().read1(size)
        if self.tell() > self._most:
            raise _bomb(self._path)
        return content


def _bomb(path: str | Path) -> DataError:
    return DataError(
        f"data.path: {str(path)!r} unpacks to more than {_MOST_UNPACKED} times its size, which no text does; "
        "if it is meant, unpack it first"
    )


def _refuse_parquet_bomb(path: str) -> None:
    """Raise DataError where a local parquet file holds far more than text packs into one of its size."""
    size = os.path.getsize(path)
    metadata = pyarrow.parquet.read_metadata(path)
    unpacked = sum(metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups))
    if unpacked > max(_ALWAYS_UNPACKED_BYTES, _MOST_UNPACKED * size):
        raise _bomb(path)


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
