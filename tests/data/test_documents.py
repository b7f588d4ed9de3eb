"""Documents and their cuts."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from windowlm.data.documents import Document, cut_by_position, hash_document
from windowlm.data.errors import DataError


def chunked(text: str, size: int) -> Document:
    return Document(read=lambda: [text[i : i + size] for i in range(0, len(text), size)], title="book")


def read(document: Document) -> str:
    return "".join(document.read())


def test_the_hash_is_of_the_whole_text_whatever_its_chunks() -> None:
    expected = (hashlib.sha256("héllo".encode()).hexdigest()[:32], 6)
    assert hash_document(chunked("héllo", 1)) == hash_document(chunked("héllo", 9)) == expected


def test_half_of_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(DataError, match="'book' is not Unicode text"):
        hash_document(chunked("a\ud800", 9))


@given(text=st.text(st.sampled_from("aé世😀"), max_size=50), size=st.integers(1, 60))
def test_parts_are_the_text_and_start_at_the_byte_of_the_cut(text: str, size: int) -> None:
    count = len(text.encode())
    parts = cut_by_position(chunked(text, size), count, 0.25, 0.25)
    assert [part.split for part in parts] == ["train", "validation", "test"]
    assert "".join(map(read, parts)) == text
    starts = [0, count - round(count * 0.5), count - round(count * 0.25)]
    for part, start, stop in zip(parts, starts, [*starts[1:], count], strict=True):
        # A character belongs to the part that holds its first byte.
        places = [len(text[:i].encode()) for i in range(len(text))]
        expected = [text[i] for i, place in enumerate(places) if start <= place < stop]
        assert read(part) == "".join(expected)


def test_a_hundred_million_bytes_are_cut_as_enwik8_is() -> None:
    parts = cut_by_position(chunked("", 1), 100_000_000, 0.05, 0.05)
    assert [part.cut for part in parts] == [
        "train: bytes 0 to 90,000,000 of book",
        "validation: bytes 90,000,000 to 95,000,000 of book",
        "test: bytes 95,000,000 to 100,000,000 of book",
    ]
