"""Trains the byte-level BPE."""

from collections.abc import Iterable
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

# Words of prose and of code alike. A word takes the space, dot, bracket, quote or underscore before it, so
# ` the`, `.append`, `(self` and `'t` can be one token; digits go in groups of three at most, so numbers
# share tokens; punctuation takes the newlines after it, so `):` and its line end can be one token; the
# indentation of a line of code is one word but for the last space, which stays with the word it precedes.
PATTERN = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)
# As the tokenizers library writes it to tokenizer.json.
PRE_TOKENIZER: dict[str, Any] = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ],
}
# Byte-level tokenizers write each byte as one visible character (Radford et al. 2019): printable Latin-1
# as itself, the others in order from U+0100 on.
_PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
BYTE_OF_CHARACTER = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(0x100 + index): byte for index, byte in enumerate(sorted(set(range(256)) - _PRINTABLE))
}


def train_bpe(pieces: Iterable[str], vocabulary_size: int, end_mark: str) -> tokenizers.Tokenizer:
    """Train a byte-level BPE that covers all 256 bytes.

    Args:
        pieces: Text, cut as by `pieces.split_text`.
        vocabulary_size: Tokens to reach, all bytes and the end mark included; little text gives fewer.
        end_mark: The special token, which gets the last id.

    Returns:
        The tokenizer, without a space put before the text and without normalisation.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size - 1,
        initial_alphabet=sorted(BYTE_OF_CHARACTER),
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator(pieces, trainer=trainer)
    tokenizer.add_special_tokens([tokenizers.AddedToken(end_mark, special=True, normalized=False)])
    return tokenizer
