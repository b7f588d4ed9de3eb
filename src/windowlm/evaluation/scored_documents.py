"""The documents that a finished run is scored on, encoded with the run's own tokenizer."""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from windowlm.bundle import UNKNOWN_SOURCE, ScorableModel
from windowlm.data.arrow_store import cache_folder, filled_cache
from windowlm.data.config import DataConfig
from windowlm.data.token_store import PreparedData, TokenSplit, prepare_all_documents, prepare_tokens
from windowlm.errors import UserError


def scored_documents(
    bundle: ScorableModel, split: str, settings: Mapping[str, Any]
) -> tuple[TokenSplit, str]:
    """Documents to score, and the hash of the data that they are of.

    With ``path`` or ``name`` these are all documents there, whole and in no split; nothing but the cache
    folder is then taken from the run, whose list of excluded documents, for one, may be what is to be
    scored. Otherwise they are a split of the run's own data.

    Args:
        bundle: the run's model, tokenizer and settings.
        split: ``validation`` or ``test``, of the run's own data.
        settings: settings of ``DataConfig``, and ``only`` with other data.

    Raises:
        UserError: a setting is wrong, the run's own data are no longer those of its training, or they have no
            such split.
        DataError: the documents cannot be read.
    """
    if "path" in settings or "name" in settings:
        cache = _own_settings(bundle)["cache_dir"]
        given = {name: value for name, value in settings.items() if name != "only"}
        data = _checked({"name": "text", "cache_dir": cache, **given})
        return prepare_all_documents(data, bundle.tokenizer, settings.get("only"))
    prepared = _own_data(bundle, settings)
    if prepared.source_identity != bundle.config["source_identity"]:
        raise UserError(
            f"checkpoint={bundle.folder}: its data are not those of its training (now "
            f"{prepared.source_identity}, then {bundle.config['source_identity']}), so the {split} split may "
            "hold text that it was trained on; score other documents: data.path=FILE"
        )
    documents = {"validation": prepared.validation, "test": prepared.test}[split]
    if not len(documents):
        raise UserError(
            f"evaluation.split={split}: these data have no {split} split ({prepared.source}); score the "
            "other one, or other documents: data.path=FILE"
        )
    return documents, prepared.source_identity


def training_documents(bundle: ScorableModel) -> tuple[TokenSplit, Path]:
    """The documents that a run was trained on, and the folder for what is prepared of them.

    Raises:
        UserError: they have changed since.
        DataError: they cannot be read.
    """
    prepared = _own_data(bundle, {})
    folder = cache_folder(_checked(_own_settings(bundle)))
    if prepared.source_identity != bundle.config["source_identity"]:
        raise UserError(
            f"checkpoint={bundle.folder}: its data are not those of its training (now "
            f"{prepared.source_identity}, then {bundle.config['source_identity']}), so that the words it was "
            "trained on cannot be counted"
        )
    return prepared.train, folder


def _own_data(bundle: ScorableModel, settings: Mapping[str, Any]) -> PreparedData:
    if bundle.config["source_identity"] == UNKNOWN_SOURCE:
        raise UserError(
            f"checkpoint={bundle.folder}: others trained it, so which documents it was trained on is not "
            "known; score documents that you name: data.path=FILE_OR_FOLDER"
        )
    return prepare_tokens(_checked({**_own_settings(bundle), **settings}), bundle.tokenizer)


def _own_settings(bundle: ScorableModel) -> dict[str, Any]:
    """The run's settings of its data."""
    settings: dict[str, Any] = bundle.config["data"]
    return settings | {"cache_dir": filled_cache(_checked(settings).cache_dir)}


def _checked(settings: Mapping[str, Any]) -> DataConfig:
    known = [field.name for field in fields(DataConfig)]
    if unknown := sorted(settings.keys() - set(known)):
        raise UserError(f"data.{unknown[0]}: there is no such setting; there are {', '.join(known)}")
    try:
        return TypeAdapter(DataConfig).validate_json(json.dumps(dict(settings)), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "value_error":
            message = f"data.{first['ctx']['error']}".replace("; try ", "; try data.")
        else:
            message = f"data.{first['loc'][0]}={first['input']!r}: {first['msg']}"
        raise UserError(message) from None
