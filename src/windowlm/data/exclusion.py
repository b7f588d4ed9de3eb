"""Leaves documents out by author and title."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from windowlm.data.errors import DataError
from windowlm.data.text_store import TextStore
from windowlm.json_text import parse_json


def excluded_documents(path: str, texts: TextStore) -> NDArray[np.bool_]:
    """Which documents a list leaves out.

    A document that a listed one duplicates is left out with it.

    Args:
        path: JSON file, a list of `{"author": ..., "title": ...}` with one of the two or both, compared
            without regard to case and surrounding white space.
        texts: The documents.

    Returns:
        bool `[documents]`.

    Raises:
        DataError: The file is missing or not such a list, or it names authors and no document has one.
    """
    try:
        entries = parse_json(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"data.exclude={path!r}: not a readable JSON file: {error}") from error
    wanted: set[tuple[str | None, str | None]] = set()
    for entry in entries if isinstance(entries, list) else [entries]:
        if not _is_allowed(entry):
            raise DataError(
                f"data.exclude={path!r}: {entry!r} is not allowed; the file is a list of "
                '{"author": "...", "title": "..."} with one of the two or both'
            )
        wanted.add((_plain(entry.get("author")), _plain(entry.get("title"))))
    if any(author for author, _ in wanted) and all(texts.author(i) is None for i in range(len(texts))):
        raise DataError(
            f"data.exclude={path!r}: it names authors, and these data have none; name titles alone, or give "
            "the column that holds the author, data.author_column=COLUMN"
        )
    left_out = set()
    for document in range(len(texts)):
        author, title = _plain(texts.author(document)), _plain(texts.title(document))
        if wanted & {(author, title), (author, None), (None, title)}:
            left_out.add(texts.hash(document))
    return np.array([texts.hash(document) in left_out for document in range(len(texts))], dtype=bool)


def _is_allowed(entry: object) -> bool:
    if not isinstance(entry, dict) or not entry or not entry.keys() <= {"author", "title"}:
        return False
    return all(isinstance(value, str) and value.strip() for value in entry.values())


def _plain(text: object) -> str | None:
    return None if text is None else str(text).strip().casefold()
