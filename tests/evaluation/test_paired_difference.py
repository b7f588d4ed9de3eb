"""Paired differences and their intervals."""

import numpy as np
import pytest
from scipy import stats

from windowlm.evaluation.paired_difference import paired_difference


def test_the_interval_is_that_of_the_paired_t_test():
    generator = np.random.default_rng(0)
    first, second = generator.normal(size=12), generator.normal(size=12)
    ours = paired_difference(first, second)
    theirs = stats.ttest_rel(second, first).confidence_interval(0.95)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))
    assert ours.mean == pytest.approx((second - first).mean())
    assert ours.pairs == 12


def test_what_is_common_to_a_pair_cancels():
    hardness = np.array([1.0, 5.0, 9.0, 20.0])
    difference = paired_difference(hardness, hardness - 0.5)
    assert (difference.mean, difference.low, difference.high) == pytest.approx((-0.5, -0.5, -0.5))


def test_a_hand_computed_interval():
    difference = paired_difference([0, 0, 0], [1, 2, 3])
    half_width = 4.302653 * 1 / 3**0.5  # t quantile 0.975 with 2 degrees of freedom, s = 1
    assert (difference.low, difference.high) == pytest.approx((2 - half_width, 2 + half_width), abs=1e-6)


def test_one_pair_has_no_interval():
    difference = paired_difference([1.0], [3.0])
    assert (difference.mean, difference.low, difference.high, difference.pairs) == (2.0, None, None, 1)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(7)
    covered = 0
    for _ in range(1000):
        difference = paired_difference(np.zeros(8), generator.normal(0.3, 1.0, size=8))
        covered += difference.low <= 0.3 <= difference.high
    assert 930 <= covered <= 970
