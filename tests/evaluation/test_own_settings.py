"""Evaluation settings that a second evaluation takes from the run."""

import json

import pytest

from windowlm.errors import UserError
from windowlm.evaluation.own_settings import with_own_settings


def completed(checkpoint, **given):
    return with_own_settings({"checkpoint": str(checkpoint), "data": {}, "evaluation": given})["evaluation"]


def test_what_is_not_given_is_as_in_the_run_or_the_run_of_the_model(tmp_path):
    settings = {"evaluation": {"max_targets": 7, "split": "test", "of_another_version": 1}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model": {}}))
    for folder in (tmp_path, tmp_path / "model"):
        assert completed(folder) == {"max_targets": 7, "split": "test"}
        assert completed(folder, split="validation") == {"max_targets": 7, "split": "validation"}


@pytest.mark.parametrize("data", [{"path": "book.txt"}, {"name": "pg19"}])
def test_of_other_data_every_target_is_scored_in_float32_and_in_no_split(tmp_path, data):
    settings = {
        "max_targets": 7,
        "max_targets_per_document": 3,
        "targets": "targets.json",
        "precision": "bf16-true",
        "context_lengths": [64],
    }
    (tmp_path / "config.json").write_text(json.dumps({"evaluation": settings}))
    values = {"checkpoint": str(tmp_path), "data": data, "evaluation": {}}
    whole = {
        "max_targets": None,
        "max_targets_per_document": None,
        "bytes_per_author": None,
        "targets": None,
        "precision": "32-true",
        "context_lengths": [64],
    }
    assert with_own_settings(values)["evaluation"] == whole
    given = {"max_targets": 5, "precision": "bf16-mixed"}
    assert with_own_settings({**values, "evaluation": given})["evaluation"] == whole | given
    with pytest.raises(UserError, match=r"^evaluation\.split=test: other data are scored whole"):
        with_own_settings({**values, "evaluation": {"split": "test"}})


def test_an_exported_model_has_no_settings_of_its_own(tmp_path):
    assert completed(tmp_path / "nowhere") == {}


def test_damaged_settings_are_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not JSON"):
        completed(tmp_path)
