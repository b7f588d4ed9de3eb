"""Data sets of the hub, on local files of the same layout and a hub that is stood in for."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfApi

from tests.data.corpus import text, texts_of
from windowlm.data import hub
from windowlm.data.config import DataConfig
from windowlm.data.errors import DataError
from windowlm.data.hub import PRESETS, find_hub_source, join_articles
from windowlm.data.token_store import prepare_tokens
from windowlm.tokenization.config import TokenizerConfig

BYTES = TokenizerConfig(kind="bytes")


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def settings(name: Any, path: Path | None, tmp_path: Path, **others: Any) -> DataConfig:
    defaults = {"sequence_length": 16, "cache_dir": str(tmp_path / "cache")}
    return DataConfig(name=name, path=None if path is None else str(path), **defaults | others)


def write_pg19(root: Path) -> None:
    def books(first: int, count: int) -> list[dict[str, Any]]:
        return [
            {"short_book_title": f"Book {i}", "publication_date": 1900, "url": f"u{i}", "text": text(i)}
            for i in range(first, first + count)
        ]

    write_parquet(root / "data" / "train-00000-of-00002-aa.parquet", books(0, 3))
    write_parquet(root / "data" / "train-00001-of-00002-bb.parquet", books(3, 2) + books(20, 1))
    write_parquet(root / "data" / "validation-00000-of-00001-cc.parquet", books(10, 2))
    write_parquet(root / "data" / "test-00000-of-00001-dd.parquet", books(20, 2))


def test_pg19_keeps_its_splits_and_a_book_of_the_test_is_not_trained_on(tmp_path: Path) -> None:
    write_pg19(tmp_path / "copy")
    prepared = prepare_tokens(settings("pg19", tmp_path / "copy", tmp_path), BYTES)
    assert texts_of(prepared) == {
        "train": [text(i) for i in range(5)],
        "validation": [text(10), text(11)],
        "test": [text(20), text(21)],
    }
    assert prepared.train.title(4) == "Book 4"
    assert prepared.duplicates_dropped == 1


def excluded(tmp_path: Path, entry: dict[str, str], **others: Any) -> int | None:
    (tmp_path / "list.json").write_text(json.dumps([entry]))
    others["exclude"] = str(tmp_path / "list.json")
    return prepare_tokens(settings("pg19", tmp_path / "copy", tmp_path, **others), BYTES).excluded


def test_books_are_left_out_by_the_columns_that_are_given(tmp_path: Path) -> None:
    write_pg19(tmp_path / "copy")
    assert excluded(tmp_path, {"title": "Book 1"}) == 1
    assert excluded(tmp_path, {"title": "u1"}, title_column="url") == 1
    assert excluded(tmp_path, {"author": "u1", "title": "Book 1"}, author_column="url") == 1
    with pytest.raises(DataError, match=r"names authors, and these data have none.*data\.author_column="):
        excluded(tmp_path, {"author": "u1"})


def test_a_local_copy_may_lie_in_a_folder_of_any_name(tmp_path: Path) -> None:
    write_pg19(tmp_path / "pg [copy] *?")
    prepared = prepare_tokens(settings("pg19", tmp_path / "pg [copy] *?", tmp_path), BYTES)
    assert len(prepared.train) == 5


@pytest.mark.parametrize("name", ["pg19", "wikitext-103", "enwik8", "tinystories", "fineweb-edu"])
def test_a_column_that_is_not_there_is_named(tmp_path: Path, name: Any) -> None:
    for pattern in PRESETS[name].files.values():
        write_parquet(tmp_path / "copy" / pattern.replace("*", "0"), [{"text": text(0)}])
    with pytest.raises(DataError, match=r"^data\.text_column=txt: .* has the columns 'text'; give"):
        prepare_tokens(settings(name, tmp_path / "copy", tmp_path, text_column="txt", documents=2), BYTES)


def test_a_limit_of_documents_is_for_the_training_split(tmp_path: Path) -> None:
    write_pg19(tmp_path / "copy")
    prepared = prepare_tokens(settings("pg19", tmp_path / "copy", tmp_path, documents=2), BYTES)
    assert {name: len(texts) for name, texts in texts_of(prepared).items()} == {
        "train": 2,
        "validation": 2,
        "test": 2,
    }


def wiki_lines(title: str) -> list[str]:
    return [
        *("", f" = {title} = \n", ""),
        *(
            f" {title} is a thing . \n",
            " = = Uses = = \n",
            "",
            f" {text(len(title))} \n",
            " = not a title = \n",
        ),
    ]


def test_wikitext_rows_become_articles(tmp_path: Path) -> None:
    for split, titles in {"train": ["A", "B b", "C"], "validation": ["D"], "test": ["E"]}.items():
        rows = [{"text": line} for title in titles for line in wiki_lines(title)]
        write_parquet(tmp_path / "copy" / "wikitext-103-raw-v1" / f"{split}-00000-of-00001.parquet", rows)
    prepared = prepare_tokens(settings("wikitext-103", tmp_path / "copy", tmp_path), BYTES)
    assert [prepared.train.title(i) for i in range(len(prepared.train))] == ["A", "B b", "C"]
    assert (len(prepared.validation), len(prepared.test)) == (1, 1)


def test_joined_articles_are_the_original_file() -> None:
    lines = [line for title in ("A", "B = C", "D") for line in wiki_lines(title)]
    articles = list(join_articles(lines))
    assert [title for title, _ in articles] == ["A", "B = C", "D"]
    assert "".join(article for _, article in articles) == "".join(line or " \n" for line in lines)
    assert list(join_articles([])) == []


def test_enwik8_is_cut_by_position_from_parquet_and_from_the_file_itself(tmp_path: Path) -> None:
    whole = "".join(f"<page>{text(i)}</page>\n" for i in range(40))
    write_parquet(tmp_path / "copy" / "enwik8-raw" / "train" / "0000.parquet", [{"text": whole}])
    (tmp_path / "enwik8").write_text(whole, encoding="utf-8")
    for path in (tmp_path / "copy", tmp_path / "enwik8"):
        prepared = prepare_tokens(settings("enwik8", path, tmp_path), BYTES)
        texts = texts_of(prepared)
        assert "".join(texts["train"] + texts["validation"] + texts["test"]) == whole
        assert prepared.train.byte_count == pytest.approx(0.9 * len(whole.encode()), abs=4)
        assert prepared.validation.byte_count == pytest.approx(0.05 * len(whole.encode()), abs=4)
        assert [cut.split(":")[0] for cut in prepared.cuts] == ["train", "validation", "test"]


def test_enwik8_in_lines_is_joined(tmp_path: Path) -> None:
    lines = [f"line {text(i, words=5)}".replace("\n", "") for i in range(40)]
    rows = [{"text": line} for line in lines]
    write_parquet(tmp_path / "copy" / "enwik8-raw" / "train" / "0000.parquet", rows)
    texts = texts_of(prepare_tokens(settings("enwik8", tmp_path / "copy", tmp_path), BYTES))
    assert "".join(texts["train"] + texts["validation"] + texts["test"]) == "\n".join(lines)


def test_tinystories_has_no_test_split(tmp_path: Path) -> None:
    rows = [{"text": text(i)} for i in range(6)]
    write_parquet(tmp_path / "copy" / "data" / "train-00000-of-00001.parquet", rows[:4])
    write_parquet(tmp_path / "copy" / "data" / "validation-00000-of-00001.parquet", rows[4:])
    prepared = prepare_tokens(settings("tinystories", tmp_path / "copy", tmp_path), BYTES)
    assert (len(prepared.train), len(prepared.validation), len(prepared.test)) == (4, 2, 0)


def test_fineweb_edu_takes_the_stated_number_of_documents(tmp_path: Path) -> None:
    for file in range(2):
        rows = [{"text": text(100 * file + i), "url": "u"} for i in range(20)]
        write_parquet(tmp_path / "copy" / "sample" / "10BT" / f"00{file}_00000.parquet", rows)
    prepared = prepare_tokens(settings("fineweb-edu", tmp_path / "copy", tmp_path, documents=25), BYTES)
    texts = texts_of(prepared)
    assert all(texts.values())
    expected = {text(i) for i in range(20)} | {text(100 + i) for i in range(5)}
    assert {read for split in texts.values() for read in split} == expected


def test_a_copy_that_lacks_a_split_is_refused(tmp_path: Path) -> None:
    write_pg19(tmp_path / "copy")
    for file in (tmp_path / "copy" / "data").glob("validation-*"):
        file.unlink()
    with pytest.raises(DataError, match=r"no file data/validation-\*\.parquet for the validation split"):
        find_hub_source(settings("pg19", tmp_path / "copy", tmp_path))


class StandInHub:
    """Resolves revisions and downloads from a local folder."""

    def __init__(self, root: Path, commit: str) -> None:
        self.root, self.commit = root, commit
        self.failure: Exception | None = None
        self.asked: list[tuple[str, str]] = []

    def dataset_info(self, repository: str, *, revision: str, timeout: float) -> SimpleNamespace:
        if self.failure is not None:
            raise self.failure
        self.asked.append((repository, revision))
        return SimpleNamespace(sha=self.commit)

    def snapshot_download(
        self, repository: str, *, repo_type: str, revision: str, allow_patterns: list[str]
    ) -> str:
        assert (repo_type, revision) == ("dataset", self.commit)
        if self.failure is not None:
            raise self.failure
        assert allow_patterns == list(PRESETS["pg19"].files.values())
        return str(self.root)


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandInHub:
    write_pg19(tmp_path / "repository")
    stand_in = StandInHub(tmp_path / "repository", commit="c0ffee" + "0" * 34)
    monkeypatch.setattr(hub, "HfApi", lambda: stand_in)
    monkeypatch.setattr(hub, "snapshot_download", stand_in.snapshot_download)
    return stand_in


def real_failures() -> list[Exception]:
    """What the hub's client raises where nothing answers, and where it was told to stay offline."""
    failures = []
    for offline in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
            try:
                HfApi(endpoint="http://127.0.0.1:9").dataset_info("emozilla/pg19", timeout=5)
            except Exception as failure:
                failures.append(failure)
    return failures


def test_a_missing_network_says_what_to_do_without_one(stand_in: StandInHub, tmp_path: Path) -> None:
    failures = real_failures()
    assert len(failures) == 2
    for number, failure in enumerate(failures):
        stand_in.failure = failure
        with pytest.raises(DataError, match=r"emozilla/pg19 could not be read .*data\.path=FILE_OR_FOLDER"):
            find_hub_source(settings("pg19", None, tmp_path))
        # The revision is known, and the files are what is missing.
        stand_in.failure = None
        source = find_hub_source(settings("pg19", None, tmp_path, revision=str(number)))
        stand_in.failure = failure
        with pytest.raises(DataError, match=r"emozilla/pg19 could not be read .*data\.path=FILE_OR_FOLDER"):
            next(source.documents())


@pytest.mark.usefixtures("stand_in")
def test_a_stream_that_breaks_says_what_to_do_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for failure in real_failures():

        def refuse(*_: Any, failure: Exception = failure, **__: Any) -> None:
            raise failure

        monkeypatch.setattr("windowlm.data.readers.HfFileSystem", refuse)
        with pytest.raises(DataError, match=r"fineweb-edu could not be read .*data=NAME data\.path=COPY"):
            prepare_tokens(settings("fineweb-edu", None, tmp_path, documents=2), BYTES)


@pytest.mark.usefixtures("stand_in")
def test_a_stream_is_read_in_the_order_of_its_files_and_no_further_than_the_last_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in range(3):
        write_parquet(tmp_path / f"00{file}.parquet", [{"text": text(10 * file + i)} for i in range(10)])
    opened = []

    class Streamed:
        def glob(self, pattern: str) -> list[str]:
            assert pattern.startswith("hf://datasets/HuggingFaceFW/fineweb-edu@c0ffee")
            return [str(path) for path in sorted(tmp_path.glob("00*.parquet"), reverse=True)]

        def open(self, path: str) -> Any:
            opened.append(path)
            return open(path, "rb")

    monkeypatch.setattr("windowlm.data.readers.HfFileSystem", Streamed)
    prepared = prepare_tokens(settings("fineweb-edu", None, tmp_path, documents=14), BYTES)
    assert {read for split in texts_of(prepared).values() for read in split} == set(map(text, range(14)))
    assert opened == [str(tmp_path / f"00{file}.parquet") for file in (0, 1)]


def test_the_revision_is_resolved_recorded_and_remembered_without_a_network(
    stand_in: StandInHub, tmp_path: Path
) -> None:
    online = prepare_tokens(settings("pg19", None, tmp_path, revision="v1"), BYTES)
    assert online.revision == stand_in.commit
    assert stand_in.asked == [("emozilla/pg19", "v1")]
    assert texts_of(online)["validation"] == [text(10), text(11)]

    stand_in.failure = real_failures()[0]
    offline = prepare_tokens(settings("pg19", None, tmp_path, revision="v1"), BYTES)
    assert offline.summary() == online.summary()
    with pytest.raises(DataError, match=r"emozilla/pg19 could not be read.*data\.path"):
        prepare_tokens(settings("pg19", None, tmp_path, revision="v2"), BYTES)
    (record,) = (tmp_path / "cache" / "revisions").iterdir()
    for damaged in (b"", b"{", b"[]", b"\xff"):
        record.write_bytes(damaged)
        with pytest.raises(DataError, match=r"emozilla/pg19 could not be read.*data\.path"):
            prepare_tokens(settings("pg19", None, tmp_path, revision="v1"), BYTES)


def test_another_commit_is_other_data(stand_in: StandInHub, tmp_path: Path) -> None:
    first = find_hub_source(settings("pg19", None, tmp_path))
    stand_in.commit = "b" * 40
    assert find_hub_source(settings("pg19", None, tmp_path)).key != first.key
