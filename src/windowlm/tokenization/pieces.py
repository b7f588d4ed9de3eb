"""Cuts long text where a tokenizer certainly splits, so that the pieces' tokens equal the whole text's.

Byte-level BPE merges only inside the words that its pre-tokenizer, a regular expression, cuts the text
into. The expression is matched from left to right without looking back, so a position is a certain
boundary when the word before it ends there whatever follows. That holds

- before a space that follows anything but white space, and
- before a newline or common punctuation that follows a letter or digit

for the expression of `training.PATTERN` and for GPT-2's. Letters are named by ranges that every Unicode
version since 3.0 has, because Python and the tokenizer may follow different versions.
"""

import re
from collections.abc import Iterable, Iterator

PIECE_CHARACTERS = 16_384

_LETTER_OR_DIGIT = (
    "0-9A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u021f\u03b1-\u03c9\u0410-\u044f\u05d0-\u05ea\u0621-\u063a"
    "\u3041-\u3094\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
)
_BOUNDARY = re.compile(rf"(?<=\S)(?= )|(?<=[{_LETTER_OR_DIGIT}])(?=[\n\t,.;:!?()\u060c\u3001\u3002\uff0c])")


def split_text(chunks: Iterable[str], size: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Cut text into pieces that are encoded on their own.

    Args:
        chunks: The text in order, cut anywhere.
        size: Characters after which a piece ends at the next certain boundary; text without one stays whole.

    Yields:
        Pieces that are not empty; joined, they are the text.
    """
    buffer = ""
    searched = size
    for chunk in chunks:
        buffer += chunk
        start = 0
        while boundary := _BOUNDARY.search(buffer, start + searched):
            yield buffer[start : boundary.start()]
            start, searched = boundary.start(), size
        buffer = buffer[start:]
        searched = max(size, len(buffer))
    if buffer:
        yield buffer
