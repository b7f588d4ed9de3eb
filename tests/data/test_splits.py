"""Splits by document hash."""

import hashlib

import numpy as np
import pytest
from numpy.typing import NDArray

from windowlm.data.splits import TEST, TRAIN, VALIDATION, split_by_hash


def digests(count: int) -> NDArray[np.uint8]:
    joined = b"".join(hashlib.sha256(str(number).encode()).digest()[:16] for number in range(count))
    return np.frombuffer(joined, dtype=np.uint8).reshape(count, 16)


def test_splits_have_about_their_fractions() -> None:
    counts = np.bincount(split_by_hash(digests(20_000), 0.1, 0.05, seed=0), minlength=3)
    # Standard deviations of the binomials: 42 and 31.
    assert abs(counts[VALIDATION] - 2000) < 5 * 42
    assert abs(counts[TEST] - 1000) < 5 * 31


def test_a_document_stays_in_its_split_when_others_come() -> None:
    few, many = split_by_hash(digests(500), 0.1, 0.1, 0), split_by_hash(digests(1000), 0.1, 0.1, 0)
    assert (few == many[:500]).all()


def test_another_seed_gives_other_splits() -> None:
    assert (split_by_hash(digests(500), 0.1, 0.1, 0) != split_by_hash(digests(500), 0.1, 0.1, 1)).any()


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("fraction", [0.01, 0.49])
@pytest.mark.parametrize("count", [3, 4, 10])
def test_no_split_is_empty_from_three_documents_on(count: int, fraction: float, seed: int) -> None:
    assert set(split_by_hash(digests(count), fraction, fraction, seed)) == {TRAIN, VALIDATION, TEST}


def test_two_documents_give_no_test_and_one_is_for_training() -> None:
    assert sorted(split_by_hash(digests(2), 0.05, 0.05, 0)) == [TRAIN, VALIDATION]
    assert split_by_hash(digests(1), 0.05, 0.05, 0).tolist() == [TRAIN]
