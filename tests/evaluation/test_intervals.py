"""Intervals and tests beside slow twins and known answers."""

import math
import random

import numpy as np
import pytest
from scipy import stats

from windowlm.evaluation.bootstrap_t import bootstrap_t
from windowlm.evaluation.clusters import cluster_names, sums_by_cluster
from windowlm.evaluation.equivalence import equivalence
from windowlm.evaluation.multiple_comparisons import holm
from windowlm.evaluation.paired_difference import paired_difference
from windowlm.evaluation.seed_variation import setting_difference


def test_bootstrap_t_is_what_its_definition_says():
    values = [0.1, 0.4, -0.2, 0.3, 2.5, 0.0, 0.2]
    ours = bootstrap_t(values, resamples=4_000, seed=3)
    draw, statistics = random.Random(5), []
    mean, error = np.mean(values), stats.sem(values)
    for _ in range(40_000):
        sample = draw.choices(values, k=len(values))
        if len(set(sample)) > 1:
            statistics.append((np.mean(sample) - mean) / (np.std(sample, ddof=1) / math.sqrt(len(sample))))
    low, high = (mean - np.quantile(statistics, q) * error for q in (0.975, 0.025))
    assert ours.mean == pytest.approx(mean)
    # Two draws of the resamples, of a statistic with heavy tails.
    assert ours.low == pytest.approx(low, abs=0.05)
    assert ours.high == pytest.approx(high, rel=0.2)


def test_bootstrap_t_leans_where_the_data_lean_and_is_the_same_each_time():
    values = np.exp(np.random.default_rng(0).normal(size=20))
    found = bootstrap_t(values)
    assert found.high - found.mean > 1.3 * (found.mean - found.low)
    assert bootstrap_t(values) == found
    mirrored = bootstrap_t(-values)
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low), rel=0.01)


def test_bootstrap_t_of_normal_data_is_near_students():
    values = np.random.default_rng(1).normal(size=60)
    ours, students = bootstrap_t(values), paired_difference(np.zeros(60), values)
    assert ours.low == pytest.approx(students.low, abs=0.04)
    assert ours.high == pytest.approx(students.high, abs=0.04)


def test_bootstrap_t_says_nothing_it_cannot_know():
    assert (bootstrap_t([1.0]).low, bootstrap_t([1.0]).pairs) == (None, 1)
    assert bootstrap_t([1.0, 2.0]).low is None
    assert bootstrap_t([0.1, 0.1, 0.1]).high == pytest.approx(0.1)


def test_equivalence_is_the_ninety_percent_interval_inside_the_margin():
    generator = np.random.default_rng(2)
    verdicts = set()
    for shift in np.linspace(-0.003, 0.003, 25):
        values = generator.normal(shift, 0.002, size=12)
        interval = paired_difference(np.zeros(12), values, confidence=0.90)
        inside = interval.low > -0.002 and interval.high < 0.002
        found = equivalence(values)
        assert found.equivalent == inside
        lower = stats.ttest_1samp(values, -0.002, alternative="greater").pvalue
        upper = stats.ttest_1samp(values, 0.002, alternative="less").pvalue
        assert found.p == pytest.approx(max(lower, upper))
        verdicts.add(inside)
    assert verdicts == {True, False}


def test_few_noisy_authors_are_no_proof_of_equality():
    values = [0.02, -0.02, 0.01, -0.01]
    assert stats.ttest_1samp(values, 0).pvalue > 0.9
    assert not equivalence(values).equivalent
    assert equivalence([0.0]) is None
    assert equivalence([0.0, 0.0]).equivalent
    assert not equivalence([0.01, 0.01]).equivalent


def test_holm_by_hand():
    # 3 * 0.01, 2 * 0.02, and 0.04, which may not fall below the 0.04 before it.
    assert holm([0.02, 0.01, 0.04]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


def test_without_variation_of_seeds_the_setting_has_the_authors_interval():
    generator = np.random.default_rng(3)
    first, change = generator.normal(size=12), generator.normal(0.1, 0.02, size=12)
    found = setting_difference(np.tile(first, (3, 1)), np.tile(first + change, (2, 1)))
    authors = paired_difference(first, first + change)
    assert (found.mean, found.low, found.high) == pytest.approx((authors.mean, authors.low, authors.high))


def test_without_variation_of_authors_the_setting_has_welchs_interval():
    first, second = np.array([1.0, 1.1, 1.3]), np.array([0.7, 0.9])
    found = setting_difference(np.repeat(first[:, None], 5, 1), np.repeat(second[:, None], 5, 1))
    welch = stats.ttest_ind(second, first, equal_var=False).confidence_interval()
    assert (found.low, found.high) == pytest.approx((welch.low, welch.high))


def test_seeds_widen_the_interval_and_one_seed_has_none():
    generator = np.random.default_rng(4)
    authors = generator.normal(2, 0.3, size=40)
    first, second = (
        authors + generator.normal(0, 0.05, size=(3, 1)) + generator.normal(0, 0.01, size=(3, 40))
        for _ in range(2)
    )
    found = setting_difference(first, second)
    single = paired_difference(first[0], second[0])
    assert found.high - found.low > 3 * (single.high - single.low)
    assert setting_difference(first[:1], second).low is None


def test_an_author_is_one_cluster_and_a_document_without_author_its_own():
    clusters = cluster_names(["A", None, "A", None], ["1", "2", "3", "4"])
    assert clusters == ["A", "document 2", "A", "document 4"]
    assert sums_by_cluster([1.0, 2.0, 4.0, 8.0], clusters).tolist() == [5.0, 2.0, 8.0]
