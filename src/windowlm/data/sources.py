"""Finds the documents of the settings: the standard library, or files, folders and globs of the user."""

from __future__ import annotations

import glob
import os
import platform
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from windowlm.data.config import DataConfig
from windowlm.data.documents import Document, Source, Split
from windowlm.data.errors import DataError
from windowlm.data.hub import find_hub_source
from windowlm.data.identity import file_states, hash_of
from windowlm.data.readers import InMemory, TextFile, json_rows, parquet_rows, text_of

_SPLIT_NAME = re.compile(r"(train|validation|test)[.-]")
_TEXT = (".txt", ".md", ".txt.gz", ".md.gz")
_JSON_LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
_PARQUET = (".parquet",)
_NOT_SOURCE = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class _File:
    path: Path
    title: str
    split: Split | None = None


def find_source(data: DataConfig) -> Source:
    """The source that the settings name.

    Raises:
        DataError: The path is missing, empty or no file, folder or glob, or the hub cannot be reached.
    """
    if data.name == "stdlib":
        version = platform.python_version()
        name = f"standard library of Python {version} (source code, test folders left out)"
        return _source(name, _standard_library(), data)
    if data.name == "text":
        files, left_out = _files_of(str(data.path))
        name = f"{data.path} ({left_out:,} files of other types left out)" if left_out else str(data.path)
        return _source(name, files, data)
    return find_hub_source(data)


def _source(name: str, files: list[_File], data: DataConfig) -> Source:
    states = file_states(file.path for file in files)
    names = [(file.title, file.split) for file in files]
    return Source(
        name=name,
        key=hash_of(states, names, data.text_column, data.title_column, data.author_column),
        documents=lambda: _documents(files, data),
        byte_count=sum(size for _, size, _ in states),
    )


def _standard_library() -> list[_File]:
    """Python files of the running interpreter's standard library, sorted, without its test folders."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _NOT_SOURCE]
        paths = [Path(folder) / name for name in names if name.endswith(".py")]
        files += [_File(path, path.relative_to(root).as_posix()) for path in paths if path.is_file()]
    return sorted(files, key=lambda file: file.title)


def _files_of(path: str) -> tuple[list[_File], int]:
    """Files of a path, sorted, with the splits that their names state, and how many of a folder are left out.

    What exists is taken as it is, so names may hold `*`, `?` and brackets, also those of folders in a glob.
    """
    root, left_out = Path(path).expanduser(), 0
    try:
        if root.is_dir():
            files = _files_in(root)
            read = [file for file in files if file.title.lower().endswith((*_TEXT, *_JSON_LINES, *_PARQUET))]
            if files and not read:
                raise DataError(
                    f"data.path={path!r}: no .txt, .md, .jsonl or .parquet file in the folder; name other "
                    f"text by a glob: data.path={str(root / '**' / ('*' + files[0].path.suffix))!r}"
                )
            files, left_out = read, len(files) - len(read)
            named = [file for file in files if _SPLIT_NAME.match(file.title) and "/" not in file.title]
            if any(file.title.startswith("train") for file in named) and len(named) > 1:
                left_out += len(files) - len(named)
                files = _with_splits(path, named)
        elif root.exists():
            if not root.is_file():
                raise DataError(f"data.path={path!r}: neither a file nor a folder; give one, or a glob")
            files = [_File(root, root.name)]
        else:
            matches = sorted(glob.glob(_pattern(root), recursive=True))
            files = [_File(Path(match), match) for match in matches if os.path.isfile(match)]
            if not files:
                raise DataError(
                    f"data.path={path!r}: no such file or folder, and no file matches it as a glob; "
                    f"relative paths start at {os.getcwd()!r}"
                )
    except OSError as error:
        raise DataError(f"data.path={path!r}: not readable: {error.strerror}: {error.filename!r}") from error
    if not any(file.path.stat().st_size for file in files):
        raise DataError(f"data.path={path!r}: empty; give a path with text in it")
    return files, left_out


def _pattern(path: Path) -> str:
    """The path as a glob whose folders that exist are meant to the letter."""
    parents = [folder for folder in path.parents if folder.exists()]
    return str(Path(glob.escape(str(parents[0])), path.relative_to(parents[0])))


def _files_in(root: Path) -> list[_File]:
    """All files below a folder but hidden ones, sorted by name.

    Raises:
        OSError: A folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise error

    files = []
    for folder, subfolders, names in os.walk(root, onerror=refuse):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        paths = [Path(folder, name) for name in names if not name.startswith(".")]
        files += [_File(path, path.relative_to(root).as_posix()) for path in paths if path.is_file()]
    return sorted(files, key=lambda file: file.title)


def _with_splits(path: str, files: list[_File]) -> list[_File]:
    """Files of a folder that states its splits: train.*, validation.* and, where there is one, test.*.

    The test comes first: of documents that splits share, the first one is kept.
    """
    splits: tuple[Split, ...] = ("test", "validation", "train")
    stated = [
        _File(file.path, file.title, split)
        for split in splits
        for file in files
        if file.title.startswith(split)
    ]
    for split in ("train", "validation"):
        if not any(file.path.stat().st_size for file in stated if file.split == split):
            raise DataError(
                f"data.path={path!r}: the folder states its splits by name, but {split}.* is missing or empty"
            )
    return stated


def _documents(files: list[_File], data: DataConfig) -> Iterator[Document]:
    for file in files:
        name = file.path.name.lower()
        if not file.path.stat().st_size:
            continue
        if name.endswith(_JSON_LINES):
            yield from _row_documents(json_rows(file.path), file, data)
        elif name.endswith(_PARQUET):
            columns = data.text_column, data.title_column, data.author_column
            yield from _row_documents(parquet_rows(glob.escape(str(file.path)), *columns), file, data)
        else:
            yield Document(read=TextFile(file.path), title=file.title, split=file.split)


def _row_documents(rows: Iterable[dict[str, Any]], file: _File, data: DataConfig) -> Iterator[Document]:
    for number, row in enumerate(rows, start=1):
        place = f"row {number} of {str(file.path)!r}"
        text = text_of(row, data.text_column, place)
        if "\0" in text:  # as in a file of text
            raise DataError(
                f"data.path: {place} holds zero bytes, which no text does; mend it, or leave it away"
            )
        title, author = row.get(data.title_column), row.get(data.author_column)
        if text:
            yield Document(
                read=InMemory(text),
                title=f"{file.title}:{number}" if title is None else str(title),
                author=None if author is None else str(author),
                split=file.split,
            )
