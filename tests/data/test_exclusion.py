"""Documents left out by author and title."""

import json
import os
from pathlib import Path

import pytest

from tests.data.corpus import prepare, text, texts_of
from windowlm.data.config import DataConfig
from windowlm.data.errors import DataError
from windowlm.data.token_store import prepare_all_documents
from windowlm.tokenization.tokenizer import BytesTokenizer

ROWS = [{"text": text(i), "title": f"Title {i}", "author": f"Author {i % 3}"} for i in range(12)]


def remaining(tmp_path: Path, entries: object) -> tuple[set[str], int | None]:
    (tmp_path / "books.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "list.json").write_text(json.dumps(entries))
    exclude = str(tmp_path / "list.json")
    prepared = prepare(tmp_path / "books.jsonl", tmp_path / "cache", exclude=exclude)
    return {read for texts in texts_of(prepared).values() for read in texts}, prepared.excluded


def test_author_and_title_together_leave_out_one_document(tmp_path: Path) -> None:
    left, excluded = remaining(tmp_path, [{"author": " author 1", "title": "TITLE 4"}, {"author": "X"}])
    assert excluded == 1
    assert left == {row["text"] for row in ROWS} - {ROWS[4]["text"]}


def test_an_author_alone_leaves_out_all_of_theirs(tmp_path: Path) -> None:
    left, excluded = remaining(tmp_path, [{"author": "Author 1"}])
    assert excluded == 4
    assert left == {row["text"] for row in ROWS if row["author"] != "Author 1"}


def test_what_else_an_entry_says_does_not_matter(tmp_path: Path) -> None:
    assert (
        remaining(tmp_path, [{"author": "Author 1", "title": "Title 4", "year": "1907", "bytes": 7}])[1] == 1
    )


def test_only_the_listed_documents_are_taken(tmp_path: Path) -> None:
    (tmp_path / "books.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    listing = tmp_path / "list.json"
    data = DataConfig(name="text", path=str(tmp_path / "books.jsonl"), cache_dir=str(tmp_path / "cache"))
    listing.write_text(json.dumps([{"title": "Title 4"}, {"author": "Author 2"}]))
    documents, identity = prepare_all_documents(data, BytesTokenizer(), str(listing))
    found = {documents.text(number) for number in range(len(documents))}
    assert found == {row["text"] for row in ROWS if row["author"] == "Author 2"} | {ROWS[4]["text"]}
    assert identity != prepare_all_documents(data, BytesTokenizer())[1]
    listing.write_text(json.dumps([{"title": "Nobody's"}]))
    with pytest.raises(DataError, match=r"data\.only=.*none of these 12 documents is listed"):
        prepare_all_documents(data, BytesTokenizer(), str(listing))


def test_author_and_title_must_both_match(tmp_path: Path) -> None:
    assert remaining(tmp_path, [{"author": "Author 2", "title": "Title 4"}])[1] == 0


def test_a_duplicate_of_an_excluded_document_is_left_out_with_it(tmp_path: Path) -> None:
    ROWS.append({"text": ROWS[4]["text"], "title": "Reprint", "author": "Someone"})
    try:
        left, excluded = remaining(tmp_path, [{"title": "Reprint"}])
    finally:
        ROWS.pop()
    assert excluded == 1
    assert ROWS[4]["text"] not in left


@pytest.mark.parametrize(
    "entries",
    [
        *(["Title 4"], [{"name": "Title 4"}], [{}], "Title 4"),
        *([{"author": None}], [{"author": None, "title": "Title 4"}], [{"title": 4}], [{"author": " "}]),
    ],
)
def test_a_list_of_another_form_is_refused(tmp_path: Path, entries: object) -> None:
    with pytest.raises(DataError, match=r"data\.exclude=.*is not allowed"):
        remaining(tmp_path, entries)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text(0))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match=r"data\.exclude='.*pipe': not a file"):
        prepare(tmp_path / "a.txt", tmp_path / "cache", exclude=str(tmp_path / "pipe"))


def test_a_missing_list_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text(0))
    with pytest.raises(DataError, match=r"data\.exclude=.*not a readable JSON file"):
        prepare(tmp_path / "a.txt", tmp_path / "cache", exclude=str(tmp_path / "missing.json"))
