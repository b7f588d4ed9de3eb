"""What general compressors make of a text, to compare a model's bits per byte with.

They read the text whole, as one stream: also the first token of each document, on which no model is scored,
and with all that came before, where a model sees its context: their figure is a landmark, not a rival under
the same rules.
"""

import lzma
import zlib
from collections.abc import Iterable

_GZIP_FORMAT = 31  # zlib's window bits for a gzip header and the largest window


def compressed_bits_per_byte(pieces: Iterable[bytes]) -> dict[str, float]:
    """Bits per byte of `gzip -9` and `xz -9` on the joined pieces.

    Args:
        pieces: At least one byte in all.

    Returns:
        `{"gzip": ..., "xz": ...}`, headers of the formats included.
    """
    gzip = zlib.compressobj(level=9, wbits=_GZIP_FORMAT)
    xz = lzma.LZMACompressor(preset=9)
    size = gzip_size = xz_size = 0
    for piece in pieces:
        size += len(piece)
        gzip_size += len(gzip.compress(piece))
        xz_size += len(xz.compress(piece))
    gzip_size += len(gzip.flush())
    xz_size += len(xz.flush())
    return {"gzip": 8 * gzip_size / size, "xz": 8 * xz_size / size}
