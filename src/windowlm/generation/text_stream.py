"""Bytes of tokens to text as it comes: whole characters only, and nothing of a text that ends production."""

import codecs
from collections.abc import Sequence


class TextStream:
    """Decodes bytes that are cut anywhere; all pieces together are what one decoding of all bytes gives.

    Args:
        stop: texts before which the stream ends.

    Attributes:
        stopped: whether a stop text was found.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._stop = list(stop)
        self._given: list[str] = []
        self._held = ""
        self._cut = b""

    @property
    def text(self) -> str:
        """All that was given so far."""
        return "".join(self._given)

    def add(self, data: bytes, *, final: bool = False) -> str:
        """Take in bytes and return the text that is certain now.

        Args:
            data: the next bytes.
            final: none follow; a cut character and the beginning of a stop text are text then.
        """
        if self.stopped:
            return ""
        data = self._cut + data
        # What is no UTF-8 becomes U+FFFD, a cut character once it is certain that no more bytes come.
        given, read = codecs.utf_8_decode(data, "replace", final)
        self._cut = data[read:]
        if self._stop:
            given = self._before_stop(given, final)
        self._given.append(given)
        return given

    def _before_stop(self, text: str, final: bool) -> str:
        """What is certain of the text that was held and this one."""
        held = self._held + text
        found = [(place + len(text), place) for text in self._stop if (place := held.find(text)) >= 0]
        if found:
            # The one that is complete first, as if characters came one by one.
            self.stopped = True
            _, certain = min(found)
        else:
            certain = len(held) - (0 if final else self._begun(held))
        self._held = held[certain:]
        return held[:certain]

    def _begun(self, held: str) -> int:
        """Characters at the end that may begin a stop text."""
        return max(
            (
                length
                for text in self._stop
                for length in range(1, min(len(text), len(held) + 1))
                if held.endswith(text[:length])
            ),
            default=0,
        )
