"""The tokenizers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from windowlm.tokenization.tokenizer import BytePairTokenizer, BytesTokenizer, Tokenizer
from windowlm.tokenization.training import train_bpe

END_MARK = "<|endoftext|>"
TEXT = "The cat sat on the mat.\n    return self.cat + 'é 世界 😀'\n" * 20


def train() -> tokenizers.Tokenizer:
    return train_bpe([TEXT], 350, END_MARK)


BOTH = {"bytes": BytesTokenizer(), "bpe": BytePairTokenizer(train(), END_MARK)}
both = pytest.mark.parametrize("tokenizer", BOTH.values(), ids=BOTH.keys())


@both
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
@settings(deadline=None)
def test_text_comes_back_and_its_bytes_are_counted_exactly(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.token_bytes_V[ids].sum() == len(text.encode())
    assert tokenizer.end_of_document not in ids


@both
def test_text_that_spells_the_end_mark_is_ordinary_text(tokenizer: Tokenizer) -> None:
    text = f"before{END_MARK}behind \u00ff ÿ"
    ids = tokenizer.encode(text)
    assert tokenizer.end_of_document not in ids
    assert tokenizer.decode(ids) == text


@both
def test_the_end_mark_stands_for_no_bytes(tokenizer: Tokenizer) -> None:
    end = tokenizer.end_of_document
    assert tokenizer.token_bytes_V[end] == 0
    assert (np.delete(tokenizer.token_bytes_V, end) > 0).all()
    assert tokenizer.token_bytes_V.dtype == np.int64
    assert len(tokenizer.token_bytes_V) == tokenizer.vocabulary_size
    assert tokenizer.decode([*tokenizer.encode("a"), end, *tokenizer.encode("b")]) == "ab"


@both
def test_a_cut_character_becomes_a_replacement_character(tokenizer: Tokenizer) -> None:
    ids = BOTH["bytes"].encode("é") if tokenizer is BOTH["bytes"] else tokenizer.encode("\u0631")
    assert tokenizer.decode(ids[:1]) == "\ufffd"


@both
def test_a_saved_tokenizer_loads_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "a folder")
    assert all(file.suffix == ".json" for file in (tmp_path / "a folder").iterdir())
    loaded = Tokenizer.load(tmp_path / "a folder")
    text = f"the cat {END_MARK} 世界"
    assert loaded.encode(text).tolist() == tokenizer.encode(text).tolist()
    assert loaded.identity == tokenizer.identity
    assert loaded.vocabulary_size == tokenizer.vocabulary_size
    assert loaded.end_of_document == tokenizer.end_of_document


@both
def test_many_texts_at_once_are_encoded_as_one_by_one(tokenizer: Tokenizer) -> None:
    texts = ["the cat", "", "世界", END_MARK]
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == [
        tokenizer.encode(text).tolist() for text in texts
    ]


def test_bytes_are_the_utf8_bytes() -> None:
    assert BytesTokenizer().encode("é\n").tolist() == [0xC3, 0xA9, 0x0A]
    assert BytesTokenizer().end_of_document == 0xFF
    assert BytesTokenizer().vocabulary_size == 256


def test_decoding_agrees_with_the_library() -> None:
    library = train()
    ids = BOTH["bpe"].encode(TEXT)
    assert library.decode(ids.tolist()) == BOTH["bpe"].decode(ids)


def test_tokenizers_of_other_text_have_another_identity() -> None:
    other = BytePairTokenizer(train_bpe([TEXT.upper()], 350, END_MARK), END_MARK)
    assert other.identity != BOTH["bpe"].identity


def test_an_end_mark_that_is_missing_is_added() -> None:
    tokenizer = BytePairTokenizer(train(), "<|end|>")
    assert tokenizer.vocabulary_size == BOTH["bpe"].vocabulary_size + 1
    assert tokenizer.end_of_document == tokenizer.vocabulary_size - 1


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no tokenizer"):
        Tokenizer.load(tmp_path)


def test_a_tokenizer_json_is_read_whatever_its_pre_tokenizer_cuts(tmp_path: Path) -> None:
    library = train()
    library.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = BytePairTokenizer.from_file(tmp_path / "tokenizer.json", END_MARK)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert not tokenizer.splits_pieces


def changed(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    description = json.loads(train().to_str())
    change(description)
    path.write_text(json.dumps(description))
    return path


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: d.update(normalizer={"type": "NFC"}), "normalizer"),
        (lambda d: d["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True), "add_prefix_space"),
        (lambda d: d["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"), "Split"),
        (lambda d: d.update(pre_tokenizer={"type": "Whitespace"}), "no ByteLevel step"),
        (lambda d: d.update(pre_tokenizer=None), "no ByteLevel step"),
        (
            lambda d: d.update(
                model={"type": "WordLevel", "vocab": {END_MARK: 0, "a": 1}, "unk_token": END_MARK},
                added_tokens=[],
            ),
            "not BPE",
        ),
        (lambda d: d["model"].update(merges=[], vocab={"a": 0, "b": 1}) or d.update(added_tokens=[]), "254"),
    ],
)
def test_a_tokenizer_that_loses_bytes_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], reason: str
) -> None:
    path = changed(tmp_path / "tokenizer.json", change)
    with pytest.raises(ValueError, match=rf"tokenizer\.path=.*{reason}.*bytes per token would not be exact"):
        BytePairTokenizer.from_file(path, END_MARK)


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.path=.*not a tokenizer\.json"):
        BytePairTokenizer.from_file(tmp_path / "tokenizer.json", END_MARK)
    with pytest.raises(ValueError, match=r"tokenizer\.path=.*no such file"):
        BytePairTokenizer.from_file(tmp_path / "missing.json", END_MARK)
