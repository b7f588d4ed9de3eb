"""Settings of the evaluation."""

import subprocess
import sys

import pytest

from windowlm.evaluation.config import EvaluationConfig, ScoredDataConfig


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


@pytest.mark.parametrize("name", ["max_targets", "max_targets_per_document", "bytes_per_author"])
def test_targets_of_another_evaluation_need_no_budget(name):
    budget = {"max_targets": None, name: 5}
    with pytest.raises(ValueError, match=rf"^{name}=5: targets=a\.json says what .*; try {name}=null$"):
        EvaluationConfig(targets="a.json", **budget)


def test_the_settings_load_without_torch_and_numpy():
    code = "import sys, windowlm.evaluation.config; print({'torch', 'numpy', 'pydantic'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


@pytest.mark.parametrize(
    "given", [{"documents": 3}, {"exclude": "list.json"}, {"revision": "v1"}, {"text_column": "body"}]
)
def test_settings_of_other_documents_need_their_name_or_path(given):
    with pytest.raises(ValueError, match=r"give data\.path or data\.name.*; try \w+=null$"):
        ScoredDataConfig(**given)
    with pytest.raises(ValueError, match="give data"):
        ScoredDataConfig(**given, cache_dir="cache")
    for other in ({"path": "book.txt"}, {"name": "pg19"}):
        assert ScoredDataConfig(**given, **other).given() == given | other


def test_the_cache_folder_can_be_given_for_the_runs_own_documents():
    assert ScoredDataConfig(cache_dir="cache").given() == {"cache_dir": "cache"}
