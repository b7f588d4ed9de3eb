"""Folders of the cache: made once by one process, checked at each use, and made anew where they are damaged.

A folder takes its place, by a rename, once it is whole, synced and has a record of its files: their sizes and
hashes. So an interruption leaves nothing that is taken for data, and what a disk, a copy or another program
did to a file since then is found before anything is trained on it. The hashes tell damage, not malice.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock
import xxhash

from windowlm.atomic_write import json_bytes, sync_path, write_atomically
from windowlm.data.errors import DataError
from windowlm.data.progress import progress_bar
from windowlm.json_text import parse_json

RECORD = "contents.json"
# A gigabyte is hashed in 0.2 to 0.8 s, as it lies in memory or on a disk. Of a larger folder the files whose
# time is the recorded one are taken to hold what they held.
_ALWAYS_HASHED_BYTES = 2 << 30
_CHUNK_BYTES = 4 << 20


def make_once(place: Path, make: Callable[[Path], object]) -> list[Path]:
    """The files of a folder, which is made where it is not there or damaged.

    A second process waits for the first; what is there and sound is read without a lock, and where nothing
    can be written.

    Args:
        place: The folder; its name says all that decides the content.
        make: Writes the content into the folder that it is given.

    Returns:
        The files, in the order of their names.

    Raises:
        DataError: The folder cannot be written.
    """
    damage = _damage(place)
    if damage is not None:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(f"{place}.lock"):
                if (damage := _damage(place)) is not None:
                    if damage:
                        print(f"warning: {place}: {damage}; it is made anew", file=sys.stderr)
                    _make(place, make)
        except OSError as error:
            found = f"is damaged ({damage}) and " if damage else ""
            raise DataError(
                f"data.cache_dir: {str(place.parent)!r} {found}cannot be written: {error}; set another "
                "data.cache_dir"
            ) from error
    return [place / name for name in sorted(parse_json((place / RECORD).read_text(encoding="utf-8")))]


def _make(place: Path, make: Callable[[Path], object]) -> None:
    unfinished = place.with_name(f"{place.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
    try:
        unfinished.mkdir()
        make(unfinished)
        _seal(unfinished)
        if place.exists():
            shutil.rmtree(place)
        unfinished.rename(place)
        sync_path(place.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _seal(folder: Path) -> None:
    """Write the record of a folder's files, and wait until all of it is on the disk."""
    record = {}
    for path, _, names in os.walk(folder):
        for file in (Path(path, name) for name in names):
            sync_path(file)
            state = file.stat()
            record[file.relative_to(folder).as_posix()] = {
                "bytes": state.st_size,
                "modified_ns": state.st_mtime_ns,
                "xxh3_128": _hash(file),
            }
        sync_path(Path(path))
    write_atomically(folder / RECORD, json_bytes(record))


def _damage(place: Path) -> str | None:
    """What is wrong with a folder: None where it is sound, nothing said where it is not there."""
    try:
        record = parse_json((place / RECORD).read_text(encoding="utf-8"))
        if not record:
            return f"{RECORD} is damaged"
        sizes = {name: (place / name).stat().st_size for name in record}
        for name, size in sizes.items():
            if size != (recorded := record[name]["bytes"]):
                return f"{name} is damaged: it has {size:,} of {recorded:,} bytes"
        total = sum(sizes.values())
        hashed = [
            name
            for name in record
            if total <= _ALWAYS_HASHED_BYTES
            or (place / name).stat().st_mtime_ns != record[name]["modified_ns"]
        ]
        with progress_bar("checking prepared data", sum(sizes[name] for name in hashed)) as advance:
            for name in hashed:
                if _hash(place / name, advance) != record[name]["xxh3_128"]:
                    return f"{name} is damaged: it does not hold what was written"
    except (FileNotFoundError, NotADirectoryError) as error:
        return "" if error.filename == str(place / RECORD) else f"{error.filename} is missing"
    except OSError as error:
        return f"{error.filename or place} is not readable: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{RECORD} is damaged"
    return None


def _hash(file: Path, advance: Callable[[int], object] = lambda done: None) -> str:
    hashed = xxhash.xxh3_128()
    for chunk in _chunks(file):
        hashed.update(chunk)
        advance(len(chunk))
    return hashed.hexdigest()


def _chunks(file: Path) -> Iterator[memoryview]:
    """A file's content, through one piece of memory, so that what a process holds stays small."""
    content = memoryview(bytearray(_CHUNK_BYTES))
    with file.open("rb", buffering=0) as opened:
        while count := opened.readinto(content):
            yield content[:count]
