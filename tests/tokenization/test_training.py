"""Training of the BPE."""

import json

import tokenizers

from windowlm.tokenization.training import BYTE_OF_CHARACTER, PRE_TOKENIZER, train_bpe

END_MARK = "<|endoftext|>"
TEXT = ["def add(self, value):\n        return self.value + value\n", "The cat sat. The cat's mat.\n"] * 50


def words(text: str) -> list[str]:
    tokenizer = train_bpe([], 257, END_MARK)
    return [text[start:stop] for _, (start, stop) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


def test_the_byte_alphabet_is_that_of_the_library() -> None:
    assert BYTE_OF_CHARACTER.keys() == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    for character, byte in BYTE_OF_CHARACTER.items():
        assert tokenizers.decoders.ByteLevel().decode([character]) == bytes([byte]).decode(errors="replace")


def test_the_pre_tokenizer_is_written_as_the_constant_says() -> None:
    assert json.loads(train_bpe([], 257, END_MARK).to_str())["pre_tokenizer"] == PRE_TOKENIZER


def test_prose_is_cut_before_the_space_and_before_the_apostrophe() -> None:
    assert words("The cat's 12345 mats.") == ["The", " cat", "'s", " ", "123", "45", " mats", "."]


def test_code_keeps_indentation_and_line_ends_together() -> None:
    assert words("if self.a_b(x):\n        return") == [
        *("if", " self", ".a", "_b", "(x", "):\n"),
        *("       ", " return"),
    ]


def test_the_vocabulary_holds_all_bytes_and_ends_with_the_end_mark() -> None:
    tokenizer = train_bpe(TEXT, 280, END_MARK)
    assert tokenizer.get_vocab_size() == 280
    assert tokenizer.token_to_id(END_MARK) == 279
    assert BYTE_OF_CHARACTER.keys() <= tokenizer.get_vocab().keys()


def test_little_text_gives_fewer_tokens_than_asked_for() -> None:
    assert train_bpe(["aaaa"], 4096, END_MARK).get_vocab_size() < 300


def test_the_same_text_gives_the_same_tokenizer() -> None:
    assert train_bpe(TEXT, 320, END_MARK).to_str() == train_bpe(TEXT, 320, END_MARK).to_str()


def test_more_vocabulary_needs_fewer_tokens() -> None:
    small, large = train_bpe(TEXT, 260, END_MARK), train_bpe(TEXT, 320, END_MARK)
    assert len(large.encode(TEXT[0]).ids) < len(small.encode(TEXT[0]).ids)
