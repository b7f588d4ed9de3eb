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
    path.parent.mkdir(parents=True, exist_ok=True)
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
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def json_bytes(value: Any) -> bytes:
    """Content of a JSON file, indented.

    Raises:
        ValueError: a number is NaN or infinite, which JSON cannot say.
    """
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
