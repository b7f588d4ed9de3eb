"""How much a compressed file may hold before it is refused, as what would fill memory or disk."""

# Text shrinks to a fifth or so; what unpacks to more than this is not text, but may fill memory and disk.
MOST_UNPACKED = 200
_ALWAYS_UNPACKED_BYTES = 64 << 20


def most_unpacked_bytes(packed_bytes: int) -> int:
    """The largest size that a file of ``packed_bytes`` may unpack to."""
    return max(_ALWAYS_UNPACKED_BYTES, MOST_UNPACKED * packed_bytes)
