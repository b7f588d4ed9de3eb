"""Picks documents by author and title, to leave them out or to take no others."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from windowlm.data.errors import DataError
from windowlm.data.text_store import TextStore
from windowlm.json_text import parse_json


def excluded_documents(path: str, texts: TextStore) -> NDArray[np.bool_]:
    """Which documents `data.exclude` leaves out; as `listed_documents`."""
    return listed_documents("data.exclude", path, texts)


def listed_documents(key: str, path: str, texts: TextStore) -> NDArray[np.bool_]:
    """Which documents a list names.

    A document that a listed one duplicates is listed with it.

    Args:
        key: The setting that names the list.
        path: JSON file, a list of `{"author": ..., "title": ...}` with one of the two or both, compared
            without regard to case and surrounding white space; what else an entry says does not matter.
        texts: The documents.

    Returns:
        bool `[documents]`.

    Raises:
        DataError: The file is missing or not such a list, or it names authors and no document has one.
    """
    file = Path(path).expanduser()
    if file.exists() and not file.is_file():  # a pipe would be waited for
        raise DataError(f"{key}={path!r}: not a file; give a JSON file")
    try:
        entries = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{key}={path!r}: not a readable JSON file: {error}") from error
    wanted: set[tuple[str | None, str | None]] = set()
    for entry in entries if isinstance(entries, list) else [entries]:
        if not _is_allowed(entry):
            raise DataError(
                f"{key}={path!r}: {entry!r} is not allowed; the file is a list of "
                '{"author": "...", "title": "..."} with one of the two or both'
            )
        wanted.add((_plain(entry.get("author")), _plain(entry.get("title"))))
    if any(author for author, _ in wanted) and all(texts.author(i) is None for i in range(len(texts))):
        raise DataError(
            f"{key}={path!r}: it names authors, and these data have none; name titles alone, or give "
            "the column that holds the author, data.author_column=COLUMN"
        )
    listed = set()
    for document in range(len(texts)):
        author, title = _plain(texts.author(document)), _plain(texts.title(document))
        if wanted & {(author, title), (author, None), (None, title)}:
            listed.add(texts.hash(document))
    return np.array([texts.hash(document) in listed for document in range(len(texts))], dtype=bool)


def _is_allowed(entry: object) -> bool:
    if not isinstance(entry, dict):
        return False
    named = [entry[name] for name in ("author", "title") if name in entry]
    return bool(named) and all(isinstance(value, str) and value.strip() for value in named)


def _plain(text: object) -> str | None:
    return None if text is None else str(text).strip().casefold()
