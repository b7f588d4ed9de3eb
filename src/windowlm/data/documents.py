"""Documents: text that is read in chunks, and what is known about it."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from windowlm.data.errors import DataError

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True, kw_only=True)
class Document:
    """Text with a name; a long one is never in memory as a whole.

    Attributes:
        read: Gives the text's chunks from the start, each time it is called.
        title: Path or title.
        author: Author, where known.
        split: The split that the source puts it in, where it does.
        cut: What part of a larger document this is, in words, where it is one.
    """

    read: Callable[[], Iterable[str]]
    title: str | None = None
    author: str | None = None
    split: Split | None = None
    cut: str | None = None


@dataclass(frozen=True, kw_only=True)
class Source:
    """Documents that are not read yet.

    Attributes:
        name: What a person calls it.
        key: Hash of all that decides the documents, found without reading them.
        documents: Gives the documents in a fixed order; raises DataError for content that is not text.
        byte_count: Bytes to read, for the progress bar; None where they are unknown.
        revision: Commit of a hub data set.
    """

    name: str
    key: str
    documents: Callable[[], Iterator[Document]]
    byte_count: int | None = None
    revision: str | None = None


def hash_document(document: Document) -> tuple[str, int]:
    """The first 128 bits of the text's SHA-256 in hexadecimal, and its UTF-8 bytes.

    Raises:
        DataError: The text cannot be read, or holds half of a surrogate pair.
    """
    digest, size = hashlib.sha256(), 0
    for chunk in document.read():
        try:
            encoded = chunk.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"data.path: document {document.title!r} is not Unicode text: {error.reason}; "
                "mend it, or leave it away"
            ) from error
        digest.update(encoded)
        size += len(encoded)
    return digest.hexdigest()[:32], size


def cut_by_position(document: Document, size: int, validation: float, test: float) -> list[Document]:
    """Cut a single document into training, validation and test text, in this order.

    Args:
        document: The document.
        size: Its UTF-8 bytes.
        validation: Fraction of the bytes for validation.
        test: Fraction of the bytes for the test, the last ones.

    Returns:
        Three documents; a cut inside a character moves behind it.
    """
    first, second = size - round(size * (validation + test)), size - round(size * test)
    spans: list[tuple[Split, int, int]] = [
        ("train", 0, first),
        ("validation", first, second),
        ("test", second, size),
    ]
    return [
        replace(
            document,
            read=_Span(document.read, start, stop),
            split=split,
            cut=f"{split}: bytes {start:,} to {stop:,} of {document.title or 'the document'}",
        )
        for split, start, stop in spans
    ]


@dataclass(frozen=True)
class _Span:
    """Reads the characters whose first byte lies in `[start, stop)`."""

    read: Callable[[], Iterable[str]]
    start: int
    stop: int

    def __call__(self) -> Iterator[str]:
        position = 0
        for chunk in self.read():
            encoded = chunk.encode("utf-8")
            start = _next_character(encoded, self.start - position)
            stop = _next_character(encoded, self.stop - position)
            if start < stop:
                yield encoded[start:stop].decode("utf-8")
            position += len(encoded)
            if position >= self.stop:
                return


def _next_character(encoded: bytes, index: int) -> int:
    """First index at or after `index` where a UTF-8 character starts."""
    index = min(max(index, 0), len(encoded))
    while index < len(encoded) and encoded[index] & 0b1100_0000 == 0b1000_0000:
        index += 1
    return index
