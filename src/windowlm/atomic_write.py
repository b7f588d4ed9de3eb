"""Files that are either the old one or the new one, whatever happens in between."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


def write_atomically(
    path: Path,
    content: bytes | Callable[[BinaryIO], object],
    before_rename: Callable[[Path], object] = lambda partial: None,
) -> None:
    """Write beside ``path``, sync, and rename; the folder is synced too, so that the name survives.

    Args:
        path: the file; its folder is made if need be.
        content: the bytes, or a function that writes them to the open file.
        before_rename: called with the file that is written and synced; what it raises leaves the old one.
    """
    _make_folder(path.parent)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with partial.open("wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        before_rename(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, which syncing the files does not promise."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _make_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    if folder.parent != folder:
        _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def json_bytes(value: Any) -> bytes:
    """Content of a JSON file, indented.

    Raises:
        ValueError: a number is NaN or infinite, which JSON cannot say.
    """
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
