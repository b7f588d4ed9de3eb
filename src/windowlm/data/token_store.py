"""Prepared tokens: every document is encoded once, stored with Arrow, and read through the memory map."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray

from windowlm.data.arrow_store import build_or_open, cache_folder
from windowlm.data.config import DataConfig
from windowlm.data.documents import Source
from windowlm.data.errors import DataError
from windowlm.data.exclusion import excluded_documents, listed_documents
from windowlm.data.identity import code_version, hash_of
from windowlm.data.progress import progress_bar
from windowlm.data.sources import find_source
from windowlm.data.splits import TEST, TRAIN, VALIDATION, split_by_hash
from windowlm.data.text_store import TextStore, open_text_store
from windowlm.data.token_stream import TokenStream
from windowlm.data.trained_tokenizer import prepare_tokenizer
from windowlm.tokenization.config import TokenizerConfig
from windowlm.tokenization.tokenizer import Tokenizer

_FEATURES = datasets.Features({"tokens": datasets.Value("binary")})
_PIECES_AT_ONCE = 32  # the library encodes them on all cores
_SPLIT_NUMBERS = {"train": TRAIN, "validation": VALIDATION, "test": TEST}
_LEFT_OUT = -1


class TokenSplit:
    """The documents of one split and their tokens.

    Attributes:
        lengths: int64 `[documents]`, tokens of each document, end mark included.
        byte_counts: int64 `[documents]`, UTF-8 bytes of each document.
    """

    def __init__(
        self, name: str, texts: TextStore, stream: TokenStream, documents: NDArray[np.int64]
    ) -> None:
        self.name = name
        self._texts = texts
        self._stream = stream
        self._documents = documents
        self._starts = stream.row_starts[texts.first_rows[documents]]
        self.lengths: NDArray[np.int64] = stream.row_starts[texts.first_rows[documents + 1]] - self._starts
        self.byte_counts: NDArray[np.int64] = texts.byte_counts[documents]

    def __len__(self) -> int:
        """Number of documents."""
        return len(self._documents)

    def tokens(self, document: int) -> NDArray[Any]:
        """All tokens of a document, `[lengths[document]]` of uint16 or uint32, the end mark last."""
        return self.read(document, 0, int(self.lengths[document]))

    def read(self, document: int, start: int, stop: int) -> NDArray[Any]:
        """Tokens `[start, stop)` of a document; of a long one only this part is touched."""
        first = int(self._starts[document])
        return self._stream.read(first + start, first + min(stop, int(self.lengths[document])))

    def text(self, document: int) -> str:
        """The text of a document."""
        return "".join(self._texts.text(int(self._documents[document])))

    def document_hash(self, document: int) -> str:
        """Hexadecimal hash of a document's text."""
        return self._texts.hash(int(self._documents[document]))

    def title(self, document: int) -> str | None:
        """Title or path of a document."""
        return self._texts.title(int(self._documents[document]))

    def author(self, document: int) -> str | None:
        """Author of a document, where the source states one."""
        return self._texts.author(int(self._documents[document]))

    @property
    def token_count(self) -> int:
        """Tokens of all documents, end marks included."""
        return int(self.lengths.sum())

    @property
    def byte_count(self) -> int:
        """UTF-8 bytes of all documents."""
        return int(self.byte_counts.sum())


@dataclass(frozen=True)
class PreparedData:
    """Tokens of all splits, ready for training and evaluation.

    Attributes:
        tokenizer: The tokenizer that made the tokens.
        train: Training split.
        validation: Validation split.
        test: Test split; without documents where the source has none.
        source: What a person calls the data.
        source_identity: Hash of the texts of all splits and which split each is in.
        revision: Commit of a hub data set.
        duplicates_dropped: Documents left out because an earlier one has the same text.
        excluded: Documents left out by `data.exclude`; None without one.
        cuts: What was cut out of a single document, in words, one entry a split.
    """

    tokenizer: Tokenizer
    train: TokenSplit
    validation: TokenSplit
    test: TokenSplit
    source: str
    source_identity: str
    revision: str | None = None
    duplicates_dropped: int = 0
    excluded: int | None = None
    cuts: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Numbers for the report, as JSON can hold them."""
        splits = {
            split.name: {
                "documents": len(split),
                "bytes": split.byte_count,
                "tokens": split.token_count,
            }
            for split in (self.train, self.validation, self.test)
        }
        return {
            "source": self.source,
            "source_identity": self.source_identity,
            "revision": self.revision,
            "vocabulary_size": self.tokenizer.vocabulary_size,
            "tokenizer_identity": self.tokenizer.identity,
            **splits,
            "duplicates_dropped": self.duplicates_dropped,
            "excluded": self.excluded or 0,
            "cuts": self.cuts,
        }


def prepare_tokens(data: DataConfig, tokenizer: TokenizerConfig | Tokenizer, parts: int = 1) -> PreparedData:
    """Read, split and encode the documents of the settings, or open what an earlier run prepared.

    Args:
        data: The settings.
        tokenizer: Settings of a tokenizer, which may be trained here, or a tokenizer as it is.
        parts: Of each training sequence; a shorter one that is advised has as many.

    Raises:
        DataError: The data or the tokenizer's file are missing, unreadable or unsuited, or the
            training split is shorter than a sequence.
    """
    folder = cache_folder(data)
    source = find_source(data)
    texts = open_text_store(source, data, folder)
    splits, excluded = _assign_splits(texts, data)
    documents = {name: np.flatnonzero(splits == number) for name, number in _SPLIT_NUMBERS.items()}
    for name in ("train", "validation"):
        if not len(documents[name]):
            raise DataError(
                f"data.path={source.name!r}: no document is left for the {name} split "
                f"({len(texts)} found, {int(texts.is_duplicate.sum())} duplicates, {excluded} excluded); "
                "give more documents, or one that is longer"
            )
    applied = (
        prepare_tokenizer(tokenizer, texts, documents["train"], folder)
        if isinstance(tokenizer, TokenizerConfig)
        else tokenizer
    )
    stream = _open_token_stream(texts, applied, folder)
    prepared = PreparedData(
        tokenizer=applied,
        train=TokenSplit("train", texts, stream, documents["train"]),
        validation=TokenSplit("validation", texts, stream, documents["validation"]),
        test=TokenSplit("test", texts, stream, documents["test"]),
        source=source.name,
        source_identity=hash_of(texts.identity, splits.tolist()),
        revision=source.revision,
        duplicates_dropped=int(texts.is_duplicate.sum()),
        excluded=excluded if data.exclude else None,
        cuts=texts.cuts,
    )
    if prepared.train.token_count <= data.sequence_length:
        raise DataError(
            f"data.sequence_length={data.sequence_length}: the training split has only "
            f"{prepared.train.token_count} tokens; try data.sequence_length="
            f"{max(1, prepared.train.token_count // 8 // parts) * parts} or give more text"
        )
    return prepared


def prepare_all_documents(
    data: DataConfig, tokenizer: Tokenizer, only: str | None = None
) -> tuple[TokenSplit, str]:
    """All documents of the settings, whole and in no split, and the hash of their texts.

    Args:
        data: The settings.
        tokenizer: It encodes them.
        only: JSON file of the documents to take, as `data.exclude`; None for all.

    Raises:
        DataError: The data are missing, unreadable or not text, or none is listed.
    """
    folder = cache_folder(data)
    texts = open_text_store(_unsplit(find_source(data)), data, folder)
    left_out = texts.is_duplicate
    if data.exclude:
        left_out = left_out | excluded_documents(data.exclude, texts)
    if only is not None:
        left_out = left_out | ~listed_documents("data.only", only, texts)
        if left_out.all():
            raise DataError(f"data.only={only!r}: none of these {len(texts)} documents is listed")
    stream = _open_token_stream(texts, tokenizer, folder)
    return TokenSplit("all", texts, stream, np.flatnonzero(~left_out)), hash_of(
        texts.identity, left_out.tobytes()
    )


def _unsplit(source: Source) -> Source:
    """The source with all documents stated to be of one split, so that a single one is not cut either."""
    return replace(
        source,
        key=hash_of(source.key, "unsplit"),
        documents=lambda: (replace(document, split="train") for document in source.documents()),
    )


def _assign_splits(texts: TextStore, data: DataConfig) -> tuple[NDArray[np.int8], int]:
    """Split number of each document, -1 for those left out, and how many `data.exclude` left out."""
    kept = ~texts.is_duplicate
    excluded = excluded_documents(data.exclude, texts) if data.exclude else np.zeros(len(texts), dtype=bool)
    splits = np.full(len(texts), _LEFT_OUT, dtype=np.int8)
    if (texts.splits >= 0).all():
        splits[:] = texts.splits
    else:
        fractions = data.validation_fraction, data.test_fraction
        splits[kept] = split_by_hash(texts.digests[kept], *fractions, data.split_seed)
    splits[~kept | excluded] = _LEFT_OUT
    return splits, int((excluded & kept).sum())


def _open_token_stream(texts: TextStore, tokenizer: Tokenizer, folder: Path) -> TokenStream:
    """Tokens of all documents, row by row as in the text store, an end mark after each document."""
    dtype = np.dtype("<u2" if tokenizer.vocabulary_size <= 1 << 16 else "<u4")
    key = hash_of(texts.key, texts.identity, tokenizer.identity, code_version(sys.modules[__name__]))
    with progress_bar("encoding documents", int(texts.byte_counts.sum())) as advance:
        store = build_or_open(
            folder / "tokens", key, _FEATURES, lambda: _token_rows(texts, tokenizer, dtype, advance)
        )
    assert len(store) == len(texts.dataset), "tokens and texts are of the same rows"
    return TokenStream(store, dtype)


def _rest_of_document(texts: TextStore, row: int) -> str:
    """A whole document at its first row, nothing at its other rows."""
    document = int(np.searchsorted(texts.first_rows, row, side="right")) - 1
    return "".join(texts.text(document)) if texts.first_rows[document] == row else ""


def _token_rows(
    texts: TextStore, tokenizer: Tokenizer, dtype: np.dtype[Any], advance: Callable[[int], None]
) -> Iterator[dict[str, bytes]]:
    end_mark = np.array([tokenizer.end_of_document], dtype=dtype).tobytes()
    last_row_of_document = set((texts.first_rows[1:][~texts.is_duplicate] - 1).tolist())
    rows = len(texts.dataset)
    for start in range(0, rows, _PIECES_AT_ONCE):
        batch = range(start, min(start + _PIECES_AT_ONCE, rows))
        pieces = list(texts.pieces(batch))
        if not tokenizer.splits_pieces:
            pieces = [_rest_of_document(texts, row) for row in batch]
        for row, ids in zip(batch, tokenizer.encode_batch(pieces), strict=True):
            tokens = ids.astype(dtype).tobytes()
            yield {"tokens": tokens + end_mark if row in last_row_of_document else tokens}
        advance(sum(map(len, pieces)))
