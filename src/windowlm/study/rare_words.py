"""Which words are rare: below one in a million of the words that a model was trained on."""

from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from windowlm.atomic_write import json_bytes, write_atomically
from windowlm.json_text import parse_json
from windowlm.study.words import LETTERS

RARE_BELOW = 1e-6


class RareWords:
    """Rare are words whose share of the training words is below ``RARE_BELOW``, unseen ones too.

    Args:
        texts: the training documents.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(word.casefold() for word in LETTERS.findall(text))
        self.training_words = counts.total()
        self.frequent = frozenset(
            word for word, count in counts.items() if count >= RARE_BELOW * self.training_words
        )

    @classmethod
    def kept_in(cls, path: Path, texts: Iterable[str]) -> "RareWords":
        """Those that a file holds, or else of the texts, which are kept there where it can be written.

        The runs of a study share their training words, and counting a gigabyte of them takes minutes.

        Args:
            path: named by what decides the texts.
            texts: the training documents, read only where the file is missing or damaged.
        """
        rare = cls(())
        try:
            kept = parse_json(path.read_text(encoding="utf-8"))
            rare.training_words, rare.frequent = int(kept["training_words"]), frozenset(kept["frequent"])
        except (OSError, ValueError, KeyError, TypeError):
            rare = cls(texts)
            found = {"training_words": rare.training_words, "frequent": sorted(rare.frequent)}
            with suppress(OSError):
                write_atomically(path, json_bytes(found))
        return rare

    def __contains__(self, word: object) -> bool:
        """Whether a case-folded word is rare."""
        return word not in self.frequent
