"""Settings of the evaluation."""

import subprocess
import sys

import pytest

from windowlm.evaluation.config import EvaluationConfig


@pytest.mark.parametrize("lengths", [[], [0, 4], [8, 4], [4, 4], [-1]])
def test_context_lengths_that_do_not_increase_from_one_are_refused(lengths):
    with pytest.raises(ValueError, match=r"^context_lengths=\[.*; try context_lengths=\[[0-9,]+\]$"):
        EvaluationConfig(context_lengths=lengths)


def test_the_advice_for_unsorted_lengths_is_the_same_lengths_in_order():
    with pytest.raises(ValueError, match=r"try context_lengths=\[4,8\]$"):
        EvaluationConfig(context_lengths=[8, 4, 8])


@pytest.mark.parametrize("name", ["max_targets", "batch_tokens"])
def test_counts_below_one_are_refused(name):
    with pytest.raises(ValueError, match=rf"^{name}=0: .*; try {name}=\d+$"):
        EvaluationConfig(**{name: 0})


def test_the_settings_load_without_torch_and_numpy():
    code = "import sys, windowlm.evaluation.config; print({'torch', 'numpy', 'pydantic'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
