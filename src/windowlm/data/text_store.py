"""Documents of a source as an Arrow store: cut into pieces, hashed, duplicates found.

One row is a piece of a document, so that memory stays flat whatever the length of a document. A document that
repeats an earlier one is a row without text that is marked as a duplicate: the store says what was left out.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from windowlm.data import documents as documents_module
from windowlm.data import hub as hub_module
from windowlm.data import readers as readers_module
from windowlm.data import sources as sources_module
from windowlm.data.arrow_store import build_or_open
from windowlm.data.config import DataConfig
from windowlm.data.documents import Document, Source, cut_by_position, hash_document
from windowlm.data.errors import DataError
from windowlm.data.identity import code_version, hash_of
from windowlm.data.progress import progress_bar
from windowlm.data.readers import InMemory
from windowlm.data.splits import SPLIT_NAMES
from windowlm.tokenization import pieces as pieces_module
from windowlm.tokenization.pieces import split_text

_CODE = (documents_module, hub_module, pieces_module, readers_module, sources_module, sys.modules[__name__])
_FEATURES = datasets.Features(
    {
        "document": datasets.Value("int64"),
        "text": datasets.Value("string"),
        "hash": datasets.Value("string"),
        "title": datasets.Value("string"),
        "author": datasets.Value("string"),
        "split": datasets.Value("string"),
        "cut": datasets.Value("string"),
        "duplicate": datasets.Value("bool"),
    }
)


class TextStore:
    """The documents of a source, in its order, duplicates included as documents without text.

    Attributes:
        key: Hash of all that decides the rows: the source, its settings, and the code that cuts.
        first_rows: int64 `[documents + 1]`, the row where each document starts; the last entry ends the last.
        digests: uint8 `[documents, 16]`, hash of each document's text.
        byte_counts: int64 `[documents]`, UTF-8 bytes; 0 for duplicates.
        is_duplicate: bool `[documents]`.
        splits: int8 `[documents]`, the split that the source states: TRAIN, VALIDATION, TEST, or -1 for none.
        cuts: What was cut out of a larger document, in words.
        identity: Hash of all texts and their order.
    """

    def __init__(self, dataset: datasets.Dataset, key: str) -> None:
        self.key = key
        self.dataset = dataset
        table = dataset.data.table
        document_of_row = table.column("document").to_numpy()
        starts = np.flatnonzero(np.diff(document_of_row, prepend=-1))
        self.first_rows: NDArray[np.int64] = np.append(starts, len(document_of_row))
        first = table.select(["hash", "split", "cut", "duplicate", "title", "author"]).take(starts)
        self.digests: NDArray[np.uint8] = np.frombuffer(
            bytes.fromhex("".join(first.column("hash").to_pylist())), dtype=np.uint8
        ).reshape(-1, 16)
        numbers = pc.index_in(first.column("split"), value_set=pa.array(SPLIT_NAMES))
        self.splits: NDArray[np.int8] = pc.fill_null(numbers, -1).to_numpy().astype(np.int8)
        self.cuts: list[str] = first.column("cut").drop_null().to_pylist()
        self.is_duplicate: NDArray[np.bool_] = first.column("duplicate").to_numpy()
        self._titles, self._authors = first.column("title"), first.column("author")
        piece_bytes = pc.binary_length(table.column("text")).to_numpy().astype(np.int64)
        self.byte_counts: NDArray[np.int64] = np.add.reduceat(piece_bytes, starts)
        self.identity = hashlib.sha256(self.digests.tobytes()).hexdigest()

    def __len__(self) -> int:
        """Number of documents, duplicates included."""
        return len(self.digests)

    def hash(self, document: int) -> str:
        """Hexadecimal hash of a document's text."""
        digest: bytes = self.digests[document].tobytes()
        return digest.hex()

    def title(self, document: int) -> str | None:
        """Title or path of a document."""
        title: str | None = self._titles[document].as_py()
        return title

    def author(self, document: int) -> str | None:
        """Author of a document, where the source states one."""
        author: str | None = self._authors[document].as_py()
        return author

    def pieces(self, rows: NDArray[np.int64] | range) -> Iterator[str]:
        """Text of the rows, one by one."""
        column = self.dataset.data.table.column("text")
        for row in rows:
            yield column[int(row)].as_py()

    def text(self, document: int) -> Iterator[str]:
        """Text of a document, in pieces."""
        return self.pieces(range(int(self.first_rows[document]), int(self.first_rows[document + 1])))


def open_text_store(source: Source, data: DataConfig, folder: Path) -> TextStore:
    """Open the documents of a source, read once into the cache folder.

    Raises:
        DataError: The source holds no text, or something that is not text.
    """
    settings = [source.key, data.documents, data.validation_fraction, data.test_fraction]
    key = hash_of(*settings, code_version(*_CODE))
    with progress_bar("reading documents", source.byte_count) as advance:
        dataset = build_or_open(folder / "documents", key, _FEATURES, lambda: _rows(source, data, advance))
    return TextStore(dataset, key)


def _rows(source: Source, data: DataConfig, advance: Callable[[int], None]) -> Iterator[dict[str, Any]]:
    documents = _cut_if_single(_hashed(_first(source.documents(), data.documents)), data)
    index = -1
    for index, (document, digest, _, is_duplicate) in enumerate(documents):
        about = {
            "document": index,
            "hash": digest,
            "title": _storable(document.title),
            "author": _storable(document.author),
            "split": document.split,
            "cut": _storable(document.cut),
            "duplicate": is_duplicate,
        }
        if is_duplicate:
            yield about | {"text": ""}
        else:
            for piece in split_text(document.read()):
                yield about | {"text": piece}
                advance(len(piece))
    if index < 0:
        raise DataError(f"data.path={source.name!r}: no document holds text; give a path with text in it")


def _storable(text: str | None) -> str | None:
    """With question marks for what is no Unicode, such as bytes in the name of a file."""
    return None if text is None else text.encode("utf-8", "replace").decode("utf-8")


def _first(documents: Iterator[Document], limit: int | None) -> Iterator[Document]:
    """The first documents; stated validation and test documents do not count."""
    taken = 0
    for document in documents:
        if document.split in (None, "train"):
            if taken == limit:
                return
            taken += 1
        yield document


class _Hashed(NamedTuple):
    document: Document
    digest: str
    byte_count: int
    is_duplicate: bool


def _hashed(documents: Iterable[Document]) -> Iterator[_Hashed]:
    """Documents with their hash; one that repeats an earlier one holds no text."""
    known: set[str] = set()
    for document in documents:
        digest, byte_count = hash_document(document)
        is_duplicate = digest in known
        known.add(digest)
        kept = replace(document, read=InMemory("")) if is_duplicate else document
        yield _Hashed(kept, digest, byte_count, is_duplicate)


def _cut_if_single(documents: Iterator[_Hashed], data: DataConfig) -> Iterator[_Hashed]:
    """Cut a document that is alone but for its duplicates by position, so that all splits have text."""
    beginning = list(islice(documents, 1))
    for entry in documents:
        beginning.append(entry)
        if not entry.is_duplicate:
            return chain(beginning, documents)
    if not beginning or beginning[0].document.split is not None:
        return iter(beginning)
    single, *duplicates = beginning
    fractions = data.validation_fraction, data.test_fraction
    parts = cut_by_position(single.document, single.byte_count, *fractions)
    # All documents state a split, or none does.
    stated = (entry._replace(document=replace(entry.document, split="train")) for entry in duplicates)
    return chain(_hashed(parts), stated)
