"""Bytes of tokens to text as it comes: whole characters only, and nothing of a text that ends production."""

import codecs
from collections.abc import Sequence


class TextStream:
    """Decodes bytes that are cut anywhere; all pieces together are what one decoding of all bytes gives.

    Args:
        stop: texts before which the stream ends.

    Attributes:
        text: what was given so far.
        stopped: whether a stop text was found.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self.text = ""
        self.stopped = False
        self._stop = list(stop)
        self._held = ""
        # What is no UTF-8 becomes U+FFFD, a cut character once it is certain that no more bytes come.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, data: bytes, *, final: bool = False) -> str:
        """Take in bytes and return the text that is certain now.

        Args:
            data: the next bytes.
            final: none follow; a cut character and the beginning of a stop text are text then.
        """
        if self.stopped:
            return ""
        self._held += self._decoder.decode(data, final)
        places = [place for place in map(self._held.find, self._stop) if place >= 0]
        if places:
            self.stopped = True
            certain = min(places)
        else:
            certain = len(self._held) - (0 if final else self._begun())
        given, self._held = self._held[:certain], self._held[certain:]
        self.text += given
        return given

    def _begun(self) -> int:
        """Characters at the end that may begin a stop text."""
        return max(
            (
                length
                for text in self._stop
                for length in range(1, min(len(text), len(self._held) + 1))
                if self._held.endswith(text[:length])
            ),
            default=0,
        )
