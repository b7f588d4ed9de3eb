"""Reads text, JSON lines and parquet, a little at a time."""

from __future__ import annotations

import glob
import gzip
import io
import shlex
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import pyarrow.parquet
from huggingface_hub import HfFileSystem

from windowlm.data.errors import DataError
from windowlm.data.unpacked_size import MOST_UNPACKED, most_unpacked_bytes
from windowlm.json_text import parse_json

_CHUNK_CHARACTERS = 1 << 20
_ROWS_AT_ONCE = 64
_READ_AHEAD_BYTES = 8 << 20  # of each column, which is never in memory as a whole
# By first bytes; the mark of UTF-32 in little-endian order begins as that of UTF-16 does.
_FORMATS = {
    b"%PDF-": "a PDF",
    b"PK\3\4": "a zip archive, as .docx, .odt and .epub are",
    b"\xd0\xcf\x11\xe0": "an old Office document",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"GIF8": "a picture",
    b"\x1f\x8b": "compressed by gzip, which its name must say by .gz",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"(\xb5/\xfd": "compressed by zstd",
    b"PAR1": "parquet, which its name must say by .parquet",
}
_ENCODINGS = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_LOOKED_AT = 1024


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
                        f"data.path: {str(self.path)!r} is not UTF-8 text (it holds zero bytes); "
                        f"{_how_to_mend(self.path)}"
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
                    f"data.path: {str(path)!r} line {number} cannot be read as JSON: "
                    f"{getattr(error, 'msg', error)}"
                ) from error
            if not isinstance(row, dict):
                raise DataError(f"data.path: {str(path)!r} line {number} is not a JSON object")
            yield row


def parquet_rows(files: str, text_column: str, *other_columns: str) -> Iterator[dict[str, Any]]:
    """Rows of parquet files, in the order of their names, with the cells of the named columns alone.

    What a file's metadata say of its cells beyond their Arrow types is not followed: `datasets` would open
    files and addresses that they name.

    Args:
        files: Path or glob, local or `hf://`.
        text_column: `data.text_column`, which each file must have.
        other_columns: Columns that are given where a file has them.

    Raises:
        DataError: A local file is not parquet, cannot be read, or lacks the column.
    """
    remote = files.startswith("hf://")
    place = files
    try:
        paths = sorted(HfFileSystem().glob(files) if remote else glob.glob(files))
        if not paths:
            raise FileNotFoundError("no such file")
        for place in paths:
            with HfFileSystem().open(place) if remote else open(place, "rb") as opened:
                yield from _rows_of_parquet(opened, str(place), (text_column, *other_columns))
    except DataError:
        raise
    except Exception as error:  # pyarrow's are of many kinds, also those of Python's own that it passes on
        if remote:
            raise
        raise DataError(f"data.path: {place!r} is not readable as parquet: {error}") from error


def _rows_of_parquet(opened: BinaryIO, place: str, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    file = pyarrow.parquet.ParquetFile(opened, buffer_size=_READ_AHEAD_BYTES, pre_buffer=False)
    _refuse_parquet_bomb(file.metadata, opened.seek(0, io.SEEK_END), place)
    names = file.schema_arrow.names
    if columns[0] not in names:
        raise _lacks_column(columns[0], repr(place), names)
    given = [column for column in dict.fromkeys(columns) if column in names]
    for column in given:
        if names.count(column) > 1:
            raise DataError(
                f"data.path: {place!r} has {names.count(column)} columns of the name {column!r}; "
                "name each another, or leave one out"
            )
    for batch in file.iter_batches(_ROWS_AT_ONCE, columns=given, use_threads=False):
        # By name: a column called `text.x` is read with `text`.
        cells = [batch.column(column).to_pylist() for column in given]
        for row in zip(*cells, strict=True):
            yield dict(zip(given, row, strict=True))


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
        raise _lacks_column(column, place, row)
    text = row[column]
    if not isinstance(text, str):
        raise DataError(
            f"data.text_column={column}: {place} holds {type(text).__name__} there, not text; mend the file "
            "or give another column"
        )
    return text


def _lacks_column(column: str, place: str, columns: Iterable[str]) -> DataError:
    return DataError(
        f"data.text_column={column}: {place} has the columns {', '.join(map(repr, columns))}; give the one "
        "that holds the text"
    )


def _open_text(path: Path) -> TextIO:
    if path.suffix.lower() == ".gz":
        return io.TextIOWrapper(_BoundedGzip(path), encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")


def _open_bytes(path: Path) -> BinaryIO:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


class _BoundedGzip(gzip.GzipFile):
    """A gzip file that is refused once it holds far more than text packs into one of its size."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "rb")
        self._path = path
        self._most = most_unpacked_bytes(path.stat().st_size)

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
        f"data.path: {str(path)!r} unpacks to more than {MOST_UNPACKED} times its size, which no text does; "
        "if it is meant, unpack it first"
    )


def _refuse_parquet_bomb(metadata: Any, size: int, place: str) -> None:
    """Raise DataError where a parquet file of a size holds far more than text packs into it."""
    unpacked = sum(metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups))
    if unpacked > most_unpacked_bytes(size):
        raise _bomb(place)


def _how_to_mend(path: Path) -> str:
    """What a file that is no UTF-8 seems to be by its first bytes, and what makes text of it."""
    with suppress(OSError, EOFError, zlib.error), _open_bytes(path) as file:
        head = file.read(_LOOKED_AT)
        for mark, what in _FORMATS.items():
            if head.startswith(mark):
                return f"it is {what}, so take out the text first, or name the text files alone by a glob"
        marked = next((name for mark, name in _ENCODINGS.items() if head.startswith(mark)), None)
        if marked is None and b"\0" in head:
            return "it is binary; name the text files alone by a glob such as data.path='folder/**/*.txt'"
        target = path.with_suffix(".utf8.txt")
        convert = f"iconv -f {marked or 'LATIN1'} -t UTF-8"
        name = shlex.quote(str(path))
        converted = f"zcat {name} | {convert}" if path.suffix.lower() == ".gz" else f"{convert} {name}"
        return (
            f"{f'it is marked as {marked}, so' if marked else 'if it is text,'} convert it, for example: "
            f"{converted} > {shlex.quote(str(target))}"
        )
    return "give text in UTF-8"


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Errors of reading as a DataError that names the file and what to do."""
    try:
        yield
    except UnicodeDecodeError as error:
        byte = f"0x{error.object[error.start]:02x}"
        raise DataError(
            f"data.path: {str(path)!r} is not UTF-8 text (byte {byte}: {error.reason}); {_how_to_mend(path)}"
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"data.path: {str(path)!r} is no whole gzip file, as its name says it is: {error}; copy it "
            "again, or take .gz from its name if it is not compressed"
        ) from error
    except OSError as error:
        raise DataError(f"data.path: {str(path)!r} is not readable: {error.strerror}") from error
