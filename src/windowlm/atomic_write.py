"""Files that are either the old one or the new one, whatever happens in between."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


def write_atomically(
    path: Path,
    content: bytes | Callable[[BinaryIO], object],
    before_rename: Callable[[Path], object] = lambda partial: None,
    inside: Path | None = None,
) -> None:
    """Write beside ``path``, sync, and rename; the folder is synced too, so that the name survives.

    Args:
        path: the file; its folder is made if need be.
        content: the bytes, or a function that writes them to the open file.
        before_rename: called with the file that is written and synced; what it raises leaves the old one.
        inside: a folder above it that is there, and is not made anew where somebody has moved it away.

    Raises:
        OSError: it cannot be written; names ``path``.
    """
    _make_folder(path.parent, inside)
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
    except OSError as error:
        if error.errno is not None and error.filename in (None, str(partial)):
            error.filename = str(path)  # a write that fails does not say of which file
        raise
    finally:
        partial.unlink(missing_ok=True)
    sync_path(path.parent)


def sync_path(path: Path) -> None:
    """Wait until what a file holds is on the disk, or the names in a folder, which files do not promise."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def obstacle(folder: Path) -> str | None:
    """Why a folder cannot be made or written, to be known before the work for it; None where it can."""
    try:
        nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    except OSError as error:  # as of a name that is too long
        return error.strerror
    if not nearest.is_dir():
        return f"{nearest} is a file"
    return None if os.access(nearest, os.W_OK | os.X_OK) else f"{nearest} cannot be written"


def _make_folder(folder: Path, inside: Path | None) -> None:
    if folder.is_dir():
        return
    if folder == inside:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
    if folder.parent != folder:
        _make_folder(folder.parent, inside)
    folder.mkdir(exist_ok=True)
    sync_path(folder.parent)


def json_bytes(value: Any) -> bytes:
    """Content of a JSON file, indented.

    Raises:
        ValueError: a number is NaN or infinite, which JSON cannot say.
    """
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
