"""The order of documents and sequences: a pure function of integers, the same on every machine.

Permutations sort hashes (SplitMix64, Steele et al. 2014) instead of asking a library's generator, whose
streams may change between versions.
"""

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E37_79B9_7F4A_7C15)


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's output function, elementwise: a bijection of 64-bit numbers that looks random."""
    values = values + _GOLDEN
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
    return values ^ (values >> np.uint64(31))


def combine(*numbers: int) -> np.uint64:
    """One 64-bit key of several numbers, dependent on their order."""
    key = np.zeros(1, dtype=np.uint64)
    for number in numbers:
        key = mix(key ^ np.uint64(number % 2**64))
    return np.uint64(key[0])


def permutation(count: int, *numbers: int) -> NDArray[np.int64]:
    """A shuffled `arange(count)`, int64 `[count]`, that depends on the numbers alone."""
    keys = mix(np.arange(count, dtype=np.uint64) ^ combine(*numbers))
    return np.argsort(keys, kind="stable")
