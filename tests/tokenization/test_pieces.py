"""Pieces of long text."""

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from windowlm.tokenization.pieces import split_text
from windowlm.tokenization.tokenizer import BytePairTokenizer
from windowlm.tokenization.training import train_bpe

END_MARK = "<|endoftext|>"
# Words, all kinds of white space, digits of several scripts, combining marks, contractions, code.
TEXTS = st.lists(
    st.sampled_from(
        [
            *"aZ0 9\n\t\r.,;:!?()'\"_-=<>",
            *("word", "don't", "we'll", "\r\n", "    ", "\n\n    ", "世界", "。", "é", "e\u0301", "क्या"),
            *(
                "\u00a0",
                "\u2003",
                "\u0085",
                "\x1c",
                "²",
                "٣",
                "😀",
                "مرحبا",
                "()\n",
                "ß",
                "İ",
                "12345",
                END_MARK,
            ),
        ]
    )
    | st.characters(exclude_categories=["Cs"]),
    max_size=60,
).map("".join)


def gpt2_like(text: str) -> tokenizers.Tokenizer:
    tokenizer = train_bpe([], 257, END_MARK)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer=trainer)
    return tokenizer


TRAINING_TEXT = (
    "word we'll don't (word) word. word, the end\n\n    return 世界。世界 12345 ()\n é e\u0301 क्या\n" * 20
)
TOKENIZERS = {
    "own": BytePairTokenizer(train_bpe([TRAINING_TEXT], 400, END_MARK), END_MARK),
    "gpt2": BytePairTokenizer(gpt2_like(TRAINING_TEXT), END_MARK),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=TEXTS, size=st.integers(1, 10), chunk=st.integers(1, 10))
@settings(max_examples=300, deadline=None)
def test_tokens_of_the_pieces_equal_the_tokens_of_the_text(
    name: str, text: str, size: int, chunk: int
) -> None:
    tokenizer = TOKENIZERS[name]
    assert tokenizer.splits_pieces
    pieces = list(split_text([text[i : i + chunk] for i in range(0, len(text), chunk)], size))
    assert "".join(pieces) == text
    assert all(pieces)
    tokens = [tokenizer.encode(piece) for piece in pieces]
    assert np.concatenate([*tokens, []]).tolist() == tokenizer.encode(text).tolist()


def test_pieces_of_prose_end_soon_after_the_size() -> None:
    pieces = list(split_text(["one two three four five six seven eight nine ten. " * 100], size=20))
    assert all(20 <= len(piece) < 30 for piece in pieces[:-1])
    assert len(pieces) > 100


def test_text_without_a_certain_boundary_stays_whole() -> None:
    assert list(split_text(["a" * 50, "a" * 50], size=10)) == ["a" * 100]


def test_pieces_do_not_depend_on_the_chunks() -> None:
    text = "the quick brown fox, it jumps\nover the lazy dog " * 30
    whole = list(split_text([text], size=50))
    assert list(split_text(list(text), size=50)) == whole
