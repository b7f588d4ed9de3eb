"""The store of documents."""

import os
from pathlib import Path

import pytest

from tests.data.corpus import settings, text, write_documents
from windowlm.data.config import DataConfig
from windowlm.data.errors import DataError
from windowlm.data.sources import find_source
from windowlm.data.text_store import TextStore, open_text_store


def open_store(data: DataConfig, cache: Path) -> TextStore:
    return open_text_store(find_source(data), data, cache)


def test_documents_come_back_piece_by_piece(tmp_path: Path) -> None:
    folder = write_documents(tmp_path / "docs", 4, words=9000)
    store = open_store(settings(folder, tmp_path), tmp_path)
    for document in range(4):
        pieces = list(store.text(document))
        assert len(pieces) > 1
        assert "".join(pieces) == text(document, 9000)
        assert store.byte_counts[document] == len(text(document, 9000).encode())
        assert store.title(document) == f"{document:03}.txt"


def test_duplicates_are_kept_without_text_and_marked(tmp_path: Path) -> None:
    folder = write_documents(tmp_path / "docs", 4)
    (folder / "copy of 001.txt").write_text(text(1))
    (folder / "zz.txt").write_text(text(3))
    store = open_store(settings(folder, tmp_path), tmp_path)
    assert store.is_duplicate.tolist() == [False, False, False, False, True, True]
    assert store.hash(4) == store.hash(1)
    assert [len("".join(store.text(i))) for i in (4, 5)] == [0, 0]


def test_a_single_document_is_cut_by_position_and_the_cuts_are_stated(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("a" * 1000)
    store = open_store(settings(tmp_path / "book.txt", tmp_path), tmp_path)
    assert store.splits.tolist() == [0, 1, 2]
    assert store.cuts[1] == "validation: bytes 900 to 950 of book.txt"


def test_a_document_that_is_alone_but_for_its_duplicates_is_cut(tmp_path: Path) -> None:
    whole = text(0, 500)
    (tmp_path / "docs").mkdir()
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / "docs" / name).write_text(whole)
    store = open_store(settings(tmp_path / "docs", tmp_path), tmp_path)
    assert store.is_duplicate.tolist() == [False, False, False, True, True]
    assert "".join("".join(store.text(document)) for document in range(5)) == whole
    assert [cut.partition(":")[0] for cut in store.cuts] == ["train", "validation", "test"]
    assert (store.splits >= 0).all()


def test_a_limit_counts_documents_in_their_order(tmp_path: Path) -> None:
    folder = write_documents(tmp_path / "docs", 6)
    store = open_store(settings(folder, tmp_path, documents=4), tmp_path)
    assert [store.title(i) for i in range(len(store))] == [f"{i:03}.txt" for i in range(4)]


def test_the_identity_is_of_the_texts_and_not_of_their_place(tmp_path: Path) -> None:
    first = open_store(settings(write_documents(tmp_path / "a", 3), tmp_path), tmp_path)
    same = open_store(settings(write_documents(tmp_path / "b", 3), tmp_path), tmp_path)
    other = open_store(settings(write_documents(tmp_path / "c", 4), tmp_path), tmp_path)
    assert first.identity == same.identity != other.identity


def test_rows_without_text_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(DataError, match="no document holds text"):
        open_store(settings(tmp_path / "a.jsonl", tmp_path), tmp_path)


def test_names_that_are_no_unicode_are_stored_with_question_marks(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / os.fsdecode(b"caf\xe9.txt")).write_text("one")
    (tmp_path / "docs" / "z.jsonl").write_text('{"text": "two", "author": "\\ud800"}')
    store = open_store(settings(tmp_path / "docs", tmp_path), tmp_path)
    assert (store.title(0), store.author(1)) == ("caf?.txt", "?")
