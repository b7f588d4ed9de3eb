"""The order of documents and sequences."""

import numpy as np

from windowlm.data.order import combine, mix, permutation


def test_mix_gives_the_published_numbers_of_splitmix64() -> None:
    # The first outputs of the reference implementation seeded with 0.
    seeds = np.arange(3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert mix(seeds).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_a_permutation_holds_every_number_once() -> None:
    assert sorted(permutation(1000, 1, 2).tolist()) == list(range(1000))


def test_a_permutation_depends_on_every_number_and_their_order() -> None:
    orders = {
        tuple(permutation(20, *numbers).tolist()) for numbers in [(1, 2), (2, 1), (1, 3), (1,), (1, 2, 0)]
    }
    assert len(orders) == 5
    assert permutation(20, 1, 2).tolist() == permutation(20, 1, 2).tolist()


def test_places_of_a_permutation_are_uniform() -> None:
    places = np.array([permutation(10, seed).tolist() for seed in range(2000)])
    counts = np.array([np.bincount(column, minlength=10) for column in places.T])
    # Each of 100 counts has mean 200 and standard deviation 13.4.
    assert np.abs(counts - 200).max() < 5 * 13.4


def test_combine_is_the_same_on_every_machine() -> None:
    assert int(combine(0)) == 0xE220A8397B1DCDAF
