"""Assigns documents to the training, validation and test split."""

import numpy as np
from numpy.typing import NDArray

from windowlm.data.order import combine, mix

SPLIT_NAMES = ("train", "validation", "test")
TRAIN, VALIDATION, TEST = range(3)


def split_by_hash(digests: NDArray[np.uint8], validation: float, test: float, seed: int) -> NDArray[np.int8]:
    """Split by the hash of each document's text, so that a document stays where it is when others come.

    Where the fractions of few documents give a split nothing, it takes the document nearest to it.

    Args:
        digests: uint8 `[documents, 16]`, hashes, all different.
        validation: Fraction of the documents for validation.
        test: Fraction for the test.
        seed: Another seed gives other splits.

    Returns:
        int8 `[documents]` of TRAIN, VALIDATION and TEST. Each occurs where there are three documents or more;
        two give no test, one is for training.
    """
    count = len(digests)
    numbers = np.ascontiguousarray(digests[:, :8]).view(">u8")[:, 0]
    uniform = mix(numbers.astype(np.uint64) ^ combine(seed)) / 2.0**64
    tests = int(np.count_nonzero(uniform < test))
    held_out = int(np.count_nonzero(uniform < test + validation))
    tests = min(max(tests, 1), max(count - 2, 0))
    validations = min(max(held_out - tests, 1), max(count - 1 - tests, 0))
    order = np.argsort(uniform, kind="stable")
    splits = np.full(count, TRAIN, dtype=np.int8)
    splits[order[:tests]] = TEST
    splits[order[tests : tests + validations]] = VALIDATION
    return splits
