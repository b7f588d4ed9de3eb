"""Prepared tokens."""

import os
import pickle
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import pre_tokenizers

from tests.data.corpus import all_texts, prepare, settings, text, texts_of, write_documents
from windowlm.data import text_store, token_store, trained_tokenizer
from windowlm.data.errors import DataError
from windowlm.data.token_store import prepare_all_documents, prepare_tokens
from windowlm.tokenization.config import TokenizerConfig
from windowlm.tokenization.pieces import split_text
from windowlm.tokenization.tokenizer import BytePairTokenizer, BytesTokenizer
from windowlm.tokenization.training import train_bpe


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_every_document_is_in_one_split_with_its_tokens_bytes_and_end_mark(tmp_path: Path, kind: str) -> None:
    folder = write_documents(tmp_path / "docs", 20, words=3000)
    prepared = prepare(folder, tmp_path / "cache", kind)
    texts = texts_of(prepared)
    assert sorted(chain(*texts.values())) == sorted(text(i, 3000) for i in range(20))
    assert all(texts.values())
    for split in (prepared.train, prepared.validation, prepared.test):
        for i, whole in enumerate(texts[split.name]):
            tokens = split.tokens(i)
            assert tokens.dtype == np.uint16
            assert tokens[:-1].tolist() == prepared.tokenizer.encode(whole).tolist()
            assert tokens[-1] == prepared.tokenizer.end_of_document
            assert len(tokens) == split.lengths[i]
            assert split.text(i) == whole
            assert (
                prepared.tokenizer.token_bytes_V[tokens].sum() == split.byte_counts[i] == len(whole.encode())
            )
            assert split.read(i, 5, 9).tolist() == tokens[5:9].tolist()
            assert split.read(i, len(tokens) - 2, len(tokens) + 9).tolist() == tokens[-2:].tolist()
        assert split.token_count == split.lengths.sum()
        assert split.byte_count == sum(len(whole.encode()) for whole in texts[split.name])


def test_tokens_are_read_from_the_memory_map_without_copying(tmp_path: Path) -> None:
    prepared = prepare(write_documents(tmp_path / "docs", 10), tmp_path / "cache")
    tokens = prepared.train.tokens(0)
    assert not tokens.flags.owndata
    assert not tokens.flags.writeable


def test_a_large_vocabulary_is_stored_in_four_bytes(tmp_path: Path) -> None:
    class Wide(BytesTokenizer):
        vocabulary_size = 1 << 17
        identity = "wide"

        def encode(self, text: str) -> Any:
            return super().encode(text) + 100_000

    split, _ = prepare_all_documents(
        settings(write_documents(tmp_path / "docs", 2), tmp_path / "cache"), Wide()
    )
    assert split.tokens(0).dtype == np.uint32
    assert (split.tokens(0)[:-1] - 100_000).tolist() == list(text(0).encode())


def test_a_split_can_be_sent_to_another_process(tmp_path: Path) -> None:
    prepared = prepare(write_documents(tmp_path / "docs", 10), tmp_path / "cache")
    sent = pickle.dumps(prepared.train)
    assert pickle.loads(sent).tokens(3).tolist() == prepared.train.tokens(3).tolist()


def test_duplicates_are_dropped_and_counted(tmp_path: Path) -> None:
    folder = write_documents(tmp_path / "docs", 10)
    for copy in range(3):
        (folder / f"copy {copy}.txt").write_text(text(copy))
    prepared = prepare(folder, tmp_path / "cache")
    assert prepared.duplicates_dropped == 3
    assert all_texts(prepared) == sorted(text(i) for i in range(10))


def test_named_splits_are_kept(tmp_path: Path) -> None:
    for number, name in enumerate(("train", "validation", "test")):
        (tmp_path / f"{name}.txt").write_text(text(number))
    assert texts_of(prepare(tmp_path, tmp_path / "cache")) == {
        "train": [text(0)],
        "validation": [text(1)],
        "test": [text(2)],
    }


def test_the_vocabulary_is_of_the_training_split_alone(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("aaaa bbbb " * 100)
    (tmp_path / "validation.txt").write_text("xyxyxyxy " * 100)
    prepared = prepare(tmp_path, tmp_path / "cache", "bpe")
    assert len(prepared.tokenizer.encode(" bbbb")) == 1
    assert len(prepared.tokenizer.encode("xyxy")) == 4


def test_the_vocabulary_can_be_of_a_sample(tmp_path: Path) -> None:
    folder = write_documents(tmp_path / "docs", 40)
    data = settings(folder, tmp_path / "cache")
    whole = prepare_tokens(data, TokenizerConfig(vocabulary_size=300))
    sample = prepare_tokens(data, TokenizerConfig(vocabulary_size=300, training_bytes=1000))
    assert whole.tokenizer.identity != sample.tokenizer.identity
    assert texts_of(whole) == texts_of(sample)


def test_a_tokenizer_whose_words_are_not_known_encodes_documents_whole(tmp_path: Path) -> None:
    library = train_bpe([text(0)], 300, "<|endoftext|>")
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.save(str(tmp_path / "tokenizer.json"))
    folder = write_documents(tmp_path / "docs", 3, words=9000)
    config = TokenizerConfig(kind="file", path=str(tmp_path / "tokenizer.json"))
    prepared = prepare_tokens(settings(folder, tmp_path / "cache"), config)
    assert not prepared.tokenizer.splits_pieces
    whole = prepared.train.text(0)
    assert prepared.train.tokens(0)[:-1].tolist() == prepared.tokenizer.encode(whole).tolist()
    assert prepared.train.tokens(0)[-1] == prepared.tokenizer.end_of_document


def test_a_tokenizer_can_be_given_as_it_is(tmp_path: Path) -> None:
    folder = write_documents(tmp_path / "docs", 10)
    tokenizer = BytePairTokenizer(train_bpe(["other text"], 270, "<|endoftext|>"), "<|endoftext|>")
    prepared = prepare_tokens(settings(folder, tmp_path / "cache"), tokenizer)
    assert prepared.tokenizer is tokenizer
    assert prepared.source_identity == prepare(folder, tmp_path / "cache").source_identity


def test_all_documents_are_whole_and_in_no_split(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(text(0, words=500))
    split, identity = prepare_all_documents(
        settings(tmp_path / "book.txt", tmp_path / "cache"), BytesTokenizer()
    )
    assert [split.text(i) for i in range(len(split))] == [text(0, words=500)]
    folder = write_documents(tmp_path / "docs", 5)
    (folder / "copy.txt").write_text(text(3))
    split, other = prepare_all_documents(settings(folder, tmp_path / "cache"), BytesTokenizer())
    assert sorted(split.text(i) for i in range(len(split))) == sorted(text(i) for i in range(5))
    assert identity != other


def test_a_second_run_reads_no_text_and_encodes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_documents(tmp_path / "docs", 10)
    first = prepare(folder, tmp_path / "cache", "bpe")

    def refuse(*_: Any) -> None:
        raise AssertionError("done again")

    monkeypatch.setattr(text_store, "hash_document", refuse)
    monkeypatch.setattr(trained_tokenizer, "train_bpe", refuse)
    monkeypatch.setattr(BytePairTokenizer, "encode_batch", refuse)
    second = prepare(folder, tmp_path / "cache", "bpe")
    assert second.summary() == first.summary()
    assert second.train.tokens(0).tolist() == first.train.tokens(0).tolist()


@pytest.mark.parametrize("name", ["*.arrow", "dataset_info.json", "tokenizer.json", "contents.json"])
def test_a_damaged_cache_is_named_and_prepared_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    folder = write_documents(tmp_path / "docs", 10)
    first = prepare(folder, tmp_path / "cache", "bpe")
    expected, damaged = texts_of(first), list((tmp_path / "cache").rglob(name))
    assert damaged
    for path in damaged:
        content = path.read_bytes()
        path.unlink()  # the first still maps it
        path.write_bytes(content[:-90] + b"\xff" * 8 + content[-82:])
    again = prepare(folder, tmp_path / "cache", "bpe")
    assert capsys.readouterr().err.count("; it is made anew\n") == len(damaged)
    assert again.summary() == first.summary()
    assert texts_of(again) == expected


def test_changed_text_is_prepared_anew(tmp_path: Path) -> None:
    folder = write_documents(tmp_path / "docs", 10)
    first = prepare(folder, tmp_path / "cache")
    (folder / "003.txt").write_text("changed")
    second = prepare(folder, tmp_path / "cache")
    assert "changed" in all_texts(second)
    assert first.source_identity != second.source_identity


def test_tokens_are_never_those_of_texts_that_were_cut_into_other_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_documents(tmp_path / "docs", 10, words=3000)
    first = prepare(folder, tmp_path / "cache")
    monkeypatch.setattr(text_store, "split_text", lambda chunks: split_text(chunks, size=500))
    monkeypatch.setattr(text_store, "code_version", lambda *_: "another")
    second = prepare(folder, tmp_path / "cache")
    assert first.source_identity == second.source_identity
    assert all_texts(second) == all_texts(first)
    assert len(list((tmp_path / "cache" / "tokens").rglob("*.arrow"))) == 2


def test_a_token_store_of_another_number_of_rows_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_documents(tmp_path / "docs", 10)
    monkeypatch.setattr(token_store, "_token_rows", lambda *_: iter([{"tokens": b"ab"}]))
    with pytest.raises(AssertionError, match="the same rows"):
        prepare(folder, tmp_path / "cache")


def test_the_identity_tells_splits_apart(tmp_path: Path) -> None:
    folder = write_documents(tmp_path / "docs", 30)
    first, second = (prepare(folder, tmp_path / "cache", split_seed=seed) for seed in (0, 1))
    assert first.source_identity != second.source_identity
    assert all_texts(first) == all_texts(second)


def test_an_error_while_reading_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = write_documents(tmp_path / "docs", 10)
    (folder / "zz.txt").write_bytes(b"\0")
    for _ in range(2):
        with pytest.raises(DataError, match="is binary"):
            prepare(folder, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.arrow"))
    (folder / "zz.txt").unlink()
    assert len(all_texts(prepare(folder, tmp_path / "cache"))) == 10


PROGRAM = """
import sys, time
from pathlib import Path
from tests.data.corpus import all_texts, prepare, texts_of
from windowlm.data import token_store
from windowlm.tokenization.pieces import split_text
from windowlm.tokenization.tokenizer import BytesTokenizer
folder, slow = Path(sys.argv[1]), float(sys.argv[2])
encode = BytesTokenizer.encode
def encode_slowly(self, text):
    (folder / "encoding").touch()
    time.sleep(slow)
    return encode(self, text)
BytesTokenizer.encode = encode_slowly
prepared = prepare(folder / "docs", folder / "cache")
print(prepared.source_identity, sum(map(len, texts_of(prepared).values())))
"""


def start(folder: Path, slow: float) -> subprocess.Popen[str]:
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), str(slow)], cwd=root, stdout=subprocess.PIPE, text=True
    )


def test_a_killed_run_leaves_nothing_half_made(tmp_path: Path) -> None:
    write_documents(tmp_path / "docs", 40)
    killed = start(tmp_path, slow=1.0)
    deadline = time.monotonic() + 60
    while not (tmp_path / "encoding").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    prepared = prepare(tmp_path / "docs", tmp_path / "cache")
    assert all_texts(prepared) == sorted(text(i) for i in range(40))


def test_two_processes_at_once_prepare_the_same(tmp_path: Path) -> None:
    write_documents(tmp_path / "docs", 40)
    outputs = [process.communicate(timeout=100)[0] for process in [start(tmp_path, 0.01) for _ in range(2)]]
    assert outputs[0] == outputs[1]
    assert outputs[0].endswith(" 40\n")


def test_data_shorter_than_a_sequence_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("short text " * 5)
    with pytest.raises(DataError, match=r"data\.sequence_length=1024: the training split has only 50 tokens"):
        prepare(tmp_path / "short.txt", tmp_path / "cache", sequence_length=1024)
    assert len(prepare(tmp_path / "short.txt", tmp_path / "cache", sequence_length=49).train) == 1
    cut = settings(tmp_path / "short.txt", tmp_path / "cache", sequence_length=1024)
    with pytest.raises(DataError, match=r"try data\.sequence_length=4 or give"):
        prepare_tokens(cut, TokenizerConfig(kind="bytes"), parts=4)


def test_two_identical_files_are_one_document_in_three_parts(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "docs" / name).write_text(text(0, 500))
    prepared = prepare(tmp_path / "docs", tmp_path / "cache")
    assert prepared.duplicates_dropped == 1
    assert "".join(chain(*texts_of(prepared).values())) == text(0, 500)
    assert all(texts_of(prepared).values())


def test_data_of_which_nothing_is_left_are_refused(tmp_path: Path) -> None:
    folder = write_documents(tmp_path / "docs", 2)
    (tmp_path / "list.json").write_text('[{"title": "000.txt"}, {"title": "001.txt"}]')
    with pytest.raises(DataError, match=r"no document is left for the train split.*2 found.*2 excluded"):
        prepare(folder, tmp_path / "cache", exclude=str(tmp_path / "list.json"))


def test_a_tokenizer_file_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    folder = write_documents(tmp_path / "docs", 3)
    config = TokenizerConfig(kind="file", path=str(tmp_path / "missing.json"))
    with pytest.raises(DataError, match=r"tokenizer\.path=.*no such file"):
        prepare_tokens(settings(folder, tmp_path / "cache"), config)
