"""Which words are rare: below one in a million of the words that a model was trained on."""

from collections import Counter
from collections.abc import Iterable

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
        self._frequent = {word for word, count in counts.items() if count >= RARE_BELOW * self.training_words}

    def __contains__(self, word: object) -> bool:
        """Whether a case-folded word is rare."""
        return word not in self._frequent
