"""Where documents come from."""

import gzip
import json
import os
import sysconfig
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.corpus import settings, write_documents
from windowlm.data.config import DataConfig
from windowlm.data.documents import Document
from windowlm.data.errors import DataError
from windowlm.data.sources import find_source


def documents(path: Path | str, tmp_path: Path, **others: Any) -> list[Document]:
    return list(find_source(settings(path, tmp_path / "cache", **others)).documents())


def read(document: Document) -> str:
    return "".join(document.read())


def test_the_standard_library_is_read_without_its_tests() -> None:
    source = find_source(DataConfig())
    root = Path(sysconfig.get_path("stdlib"))
    titles = [str(document.title) for document in source.documents()]
    assert titles == sorted(titles)
    assert {"argparse.py", "json/decoder.py"} <= set(titles)
    folders = {part for title in titles for part in title.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    argparse = next(document for document in source.documents() if document.title == "argparse.py")
    assert read(argparse).encode() == (root / "argparse.py").read_bytes()
    assert "test folders left out" in source.name


def test_a_link_to_nothing_in_the_standard_library_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "module.py").write_text("import this")
    (tmp_path / "removed.py").symlink_to(tmp_path / "nowhere.py")
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    assert [document.title for document in find_source(DataConfig()).documents()] == ["module.py"]


def test_a_file_is_one_document_with_every_byte_kept(tmp_path: Path) -> None:
    text = "line\r\nline\n\ttab \ufeff é\r"
    (tmp_path / "a.txt").write_bytes(text.encode())
    [document] = documents(tmp_path / "a.txt", tmp_path)
    assert read(document) == text
    assert document.title == "a.txt"
    assert document.split is None


def test_a_folder_is_read_in_order_without_hidden_and_empty_files(tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    for name in ("b.txt", "a.md", "sub/c.txt", ".hidden.txt", ".git/d.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "empty.txt").touch()
    assert [document.title for document in documents(folder, tmp_path)] == ["a.md", "b.txt", "sub/c.txt"]


def test_a_glob_takes_what_it_matches(tmp_path: Path) -> None:
    write_documents(tmp_path / "docs" / "deep", 2)
    (tmp_path / "docs" / "image.png").write_bytes(b"\x89PNG\0")
    found = documents(f"{tmp_path}/docs/**/*.txt", tmp_path)
    assert [Path(str(document.title)).name for document in found] == ["000.txt", "001.txt"]


@pytest.mark.parametrize(
    "name", ["a b.txt", "a,b.txt", "it's.txt", 'a"b.txt', "a=b.txt", "a[1]*.txt", "é{}.txt", "zip::a:b.txt"]
)
@pytest.mark.parametrize("suffix", [".txt", ".parquet"])
def test_names_may_hold_any_character(tmp_path: Path, name: str, suffix: str) -> None:
    path = tmp_path / "folder, a=[b]" / name.replace(".txt", suffix)
    path.parent.mkdir()
    if suffix == ".parquet":
        pq.write_table(pa.table({"text": ["text"]}), path)
    else:
        path.write_text("text")
    assert [read(document) for document in documents(path, tmp_path)] == ["text"]
    assert [read(document) for document in documents(path.parent, tmp_path)] == ["text"]


def test_a_folder_gives_documents_of_the_stated_types_and_says_how_many_files_are_left_out(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    for name in ("a.txt", "b.MD", "c.html", "d.py", "README", "e.pdf"):
        (folder / name).write_text(name)
    assert [document.title for document in documents(folder, tmp_path)] == ["a.txt", "b.MD"]
    assert find_source(settings(folder, tmp_path)).name == f"{folder} (4 files of other types left out)"
    assert [document.title for document in documents(f"{folder}/*.py", tmp_path)] == [f"{folder}/d.py"]
    for name in ("a.txt", "b.MD"):
        (folder / name).unlink()
    with pytest.raises(
        DataError, match=r"no \.txt, \.md, \.jsonl or \.parquet file in the folder; name .*\*\*/\*'"
    ):
        documents(folder, tmp_path)


def test_compressed_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt.gz").write_bytes(gzip.compress("é\r\n".encode()))
    (tmp_path / "docs" / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": "two"}).encode()))
    assert [read(document) for document in documents(tmp_path / "docs", tmp_path)] == ["é\r\n", "two"]
    assert [read(document) for document in documents(tmp_path / "docs" / "a.txt.gz", tmp_path)] == ["é\r\n"]


def test_folders_of_a_glob_that_exist_are_meant_to_the_letter(tmp_path: Path) -> None:
    write_documents(tmp_path / "[a] *" / "deep", 2)
    write_documents(tmp_path / "a b" / "deep", 3)
    assert len(documents(f"{tmp_path}/[a] */**/*.txt", tmp_path)) == 2


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_documents(tmp_path / "docs", 1)

    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"not readable: Permission denied: .*docs"):
        find_source(settings(tmp_path / "docs", tmp_path))


def test_json_lines_and_parquet_give_a_document_a_row(tmp_path: Path) -> None:
    rows = [
        {"text": "one", "title": "One", "author": "A"},
        {"text": "two", "title": None, "author": None},
        {"text": "", "title": "nothing", "author": "B"},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        found = documents(tmp_path / name, tmp_path)
        assert [(read(d), d.title, d.author) for d in found] == [
            ("one", "One", "A"),
            ("two", f"{name}:2", None),
        ]


def test_a_byte_order_mark_before_json_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "one"}), encoding="utf-8-sig")
    assert [read(document) for document in documents(tmp_path / "a.jsonl", tmp_path)] == ["one"]


def test_other_columns_can_hold_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": "one", "writer": "A", "name": "N"}))
    columns = {"text_column": "body", "title_column": "name", "author_column": "writer"}
    [document] = documents(tmp_path / "a.jsonl", tmp_path, **columns)
    assert (read(document), document.title, document.author) == ("one", "N", "A")
    with pytest.raises(DataError, match=r"^data\.text_column=text: row 1 of .* has the columns 'body', "):
        documents(tmp_path / "a.jsonl", tmp_path)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": None}))
    with pytest.raises(DataError, match=r"^data\.text_column=text: row 1 of .* holds NoneType there"):
        documents(tmp_path / "a.jsonl", tmp_path)


def test_files_named_by_split_keep_their_split(tmp_path: Path) -> None:
    for name in ("train.txt", "validation.jsonl", "test.txt", "train-2.txt", "notes.txt"):
        (tmp_path / name).write_text(json.dumps({"text": name}))
    found = documents(tmp_path, tmp_path)
    assert [(d.title, d.split) for d in found] == [
        ("test.txt", "test"),
        ("validation.jsonl:1", "validation"),
        ("train-2.txt", "train"),
        ("train.txt", "train"),
    ]


def test_a_folder_with_a_test_file_but_no_validation_file_is_refused(tmp_path: Path) -> None:
    for name in ("train.txt", "test.txt"):
        (tmp_path / name).write_text("text")
    with pytest.raises(DataError, match=r"validation\.\* is missing"):
        documents(tmp_path, tmp_path)


def test_the_key_follows_content_and_settings_but_needs_no_reading(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "one", "body": "uno"}))

    def key(**others: Any) -> str:
        return find_source(settings(path, tmp_path, **others)).key

    first = key()
    assert key() == first
    assert key(text_column="body") != first
    path.write_text(json.dumps({"text": "other", "body": "uno"}))
    assert key() != first


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"text\0text", "'.*a.txt' is not UTF-8 text .it holds zero bytes.; it is binary"),
        (
            "a b.txt",
            "é".encode("latin-1"),
            "is not UTF-8 text .byte 0xe9: .*iconv -f LATIN1 -t UTF-8 '.*a b.txt' > '.*a b.utf8.txt'",
        ),
        ("a.txt", "text".encode("utf-16"), "byte 0xff.*it is marked as UTF-16, so convert it"),
        ("a.txt", b"%PDF-1.7 \xff", "it is a PDF"),
        ("a.txt.gz", b"no gzip", "is no whole gzip file, as its name says it is: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}', mtime=0)[:-9], "is no whole gzip file"),
        ("a.jsonl.gz", gzip.compress(b"text" * 99, mtime=0)[:20] + b"x" * 40, "is no whole gzip file"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "line 2 cannot be read as JSON: Expecting value"),
        ("a.jsonl", b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "JSON: a number in it has more digits than"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "a\\u0000"}', "row 2 of '.*a.jsonl' holds zero bytes"),
        ("a.jsonl", b"[1]", "line 1 is not a JSON object"),
        ("a.jsonl", b"\xff", "is not UTF-8 text"),
        ("a.parquet", b"no parquet", "not readable as parquet"),
    ],
)
def test_content_that_is_not_text_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"data\.path: .*{message}"):
        list(map(read, documents(tmp_path / name, tmp_path)))


@pytest.mark.parametrize("failure", [ValueError("Bad"), pa.ArrowInvalid("Bad"), TypeError("Bad")])
def test_what_the_reader_of_parquet_refuses_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise failure

    pq.write_table(pa.table({"text": ["words"]}), tmp_path / "a.parquet")
    monkeypatch.setattr(pq, "ParquetFile", refuse)
    with pytest.raises(DataError, match=r"a\.parquet' is not readable as parquet: .*Bad"):
        documents(tmp_path / "a.parquet", tmp_path)


def test_parquet_is_read_over_row_groups_and_whatever_its_types_of_text(tmp_path: Path) -> None:
    rows = [f"text {number}" for number in range(500)]
    for name, type in (("plain", pa.string()), ("large", pa.large_string()), ("view", pa.string_view())):
        table = pa.table({"unread": range(500), "text": pa.array(rows, type), "text.x": rows})
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=150)
        assert [read(document) for document in documents(tmp_path / f"{name}.parquet", tmp_path)] == rows
    pq.write_table(pa.table({"text": pa.array(rows).dictionary_encode()}), tmp_path / "numbered.parquet")
    assert [read(document) for document in documents(tmp_path / "numbered.parquet", tmp_path)] == rows


def test_two_columns_of_one_name_are_refused_without_a_word_of_other_programs(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pq.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet' has 2 columns of the name 'text'"):
        documents(tmp_path / "a.parquet", tmp_path)
    assert capfd.readouterr() == ("", "")


def test_missing_and_empty_paths_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "nothing").mkdir()
    for path, message in (
        ("missing.txt", "no such file or folder"),
        ("*.md", "no such file or folder, and no file matches"),
        ("empty.txt", "empty; give a path with text"),
        ("nothing", "empty; give a path with text"),
    ):
        with pytest.raises(DataError, match=rf"data\.path='.*': {message}"):
            find_source(settings(tmp_path / path, tmp_path))
    with pytest.raises(DataError, match="neither a file nor a folder"):
        find_source(settings("/dev/null", tmp_path))


def test_an_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_documents(tmp_path / "docs", 1)
    source = find_source(settings(tmp_path / "docs", tmp_path))

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"000\.txt' is not readable: Permission denied"):
        read(next(source.documents()))
