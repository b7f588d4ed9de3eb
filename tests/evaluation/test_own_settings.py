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
def test_of_other_data_every_target_is_scored(tmp_path, data):
    (tmp_path / "config.json").write_text(json.dumps({"evaluation": {"max_targets": 7}}))
    values = {"checkpoint": str(tmp_path), "data": data, "evaluation": {}}
    assert with_own_settings(values)["evaluation"] == {"max_targets": None}


def test_an_exported_model_has_no_settings_of_its_own(tmp_path):
    assert completed(tmp_path / "nowhere") == {}


def test_damaged_settings_are_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not JSON"):
        completed(tmp_path)
