"""Which context lengths are measured."""

import numpy as np
import pytest

from windowlm.errors import UserError
from windowlm.evaluation.context_lengths import resolve_context_lengths


def test_the_default_is_six_powers_of_two_up_to_half_the_training_length():
    assert resolve_context_lengths(None, 1024, np.array([10_000])) == [16, 32, 64, 128, 256, 512]


def test_a_training_length_between_powers_of_two_is_not_exceeded():
    assert resolve_context_lengths(None, 1500, np.array([10_000]))[-1] == 512


def test_the_default_shrinks_until_longer_documents_hold_half_the_tokens():
    stories = np.full(100, 200)
    assert resolve_context_lengths(None, 1024, stories)[-1] == 128


def test_a_short_training_length_gives_fewer_lengths():
    assert resolve_context_lengths(None, 8, np.array([1_000])) == [1, 2, 4]


def test_lengths_beyond_every_document_are_refused_with_those_that_fit():
    with pytest.raises(UserError, match=r"has 100 tokens.*try evaluation\.context_lengths=\[16,64\]"):
        resolve_context_lengths([16, 64, 128], 1024, np.array([50, 100]))


def test_a_document_as_long_as_the_longest_context_has_no_target():
    with pytest.raises(UserError, match="try evaluation"):
        resolve_context_lengths([100], 1024, np.array([100]))


@pytest.mark.parametrize("lengths", [[], [0]])
def test_documents_without_text_are_refused(lengths):
    with pytest.raises(UserError, match=r"evaluation\.context_lengths"):
        resolve_context_lengths(None, 1024, np.array(lengths, dtype=np.int64))
