"""The words of a text with their places in its UTF-8 bytes.

Shape letters: C characters, N words.
"""

import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

LETTERS = re.compile(r"[^\W\d_]+")
SPACED = re.compile(r"\S+")
LETTERS_READ = 3


@dataclass(frozen=True)
class Words:
    """Words in the order of the text.

    Attributes:
        names: the words, case-folded.
        start: int64 ``[N]``, first byte.
        after_third_letter: int64 ``[N]``, byte behind the third letter, or the end of a shorter word.
        end: int64 ``[N]``, one past the last byte.
    """

    names: list[str]
    start: npt.NDArray[np.int64]
    after_third_letter: npt.NDArray[np.int64]
    end: npt.NDArray[np.int64]


def words_of(text: str, pattern: re.Pattern[str] = LETTERS) -> Words:
    """Runs of letters, or what else the pattern finds."""
    found = [(match.group().casefold(), match.start(), match.end()) for match in pattern.finditer(text)]
    byte_of = byte_offsets(text)
    start = np.array([first for _, first, _ in found], dtype=np.int64)
    end = np.array([last for _, _, last in found], dtype=np.int64)
    return Words(
        names=[name for name, _, _ in found],
        start=byte_of[start],
        after_third_letter=byte_of[np.minimum(start + LETTERS_READ, end)],
        end=byte_of[end],
    )


def byte_offsets(text: str) -> npt.NDArray[np.int64]:
    """First byte of each character, and the number of bytes last, ``[C + 1]``."""
    codes_C = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    sizes_C = 1 + (codes_C >= 0x80) + (codes_C >= 0x800) + (codes_C >= 0x10000)
    return np.concatenate([[0], np.cumsum(sizes_C, dtype=np.int64)])
