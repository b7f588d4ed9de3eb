"""The documents that a finished run is scored on, encoded with the run's own tokenizer."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from windowlm.bundle import Bundle
from windowlm.data.config import DataConfig
from windowlm.data.documents import Document
from windowlm.data.exclusion import excluded_documents
from windowlm.data.identity import hash_of
from windowlm.data.sources import find_source
from windowlm.data.text_store import open_text_store
from windowlm.data.token_store import (
    _SPLIT_NUMBERS,
    TokenSplit,
    _assign_splits,
    _open_token_stream,
    cache_folder,
)
from windowlm.errors import UserError


def own_split(bundle: Bundle, split: str, overrides: Mapping[str, Any]) -> tuple[TokenSplit, str]:
    """A split of the run's own data, and the identity of the data.

    Raises:
        UserError: the documents or their split are not those of the training.
    """
    data = _checked({**bundle.config["data"], **overrides})
    folder = cache_folder(data)
    texts = open_text_store(find_source(data, folder), data, folder)
    splits, _ = _assign_splits(texts, data)
    identity = hash_of(texts.identity, splits.tolist())
    if identity != bundle.config["source_identity"]:
        raise UserError(
            f"checkpoint={bundle.folder}: the documents of its data settings have changed since the training "
            f"(source {identity}, in training {bundle.config['source_identity']}), so the {split} split may "
            "hold text that it was trained on; score other documents: data.path=FILE"
        )
    stream = _open_token_stream(texts, bundle.tokenizer, folder)
    return TokenSplit(split, texts, stream, np.flatnonzero(splits == _SPLIT_NUMBERS[split])), identity


def all_documents(bundle: Bundle, settings: Mapping[str, Any]) -> tuple[TokenSplit, str]:
    """All documents of other data, whole and in no split, and the identity of the data.

    Nothing but the cache folder is taken from the run: its list of excluded documents, for one, may be
    what is to be scored.
    """
    cache = {"cache_dir": bundle.config["data"].get("cache_dir")}
    data = _checked({"name": "text", **cache, **settings})
    folder = cache_folder(data)
    source = find_source(data, folder)

    def unsplit() -> Iterator[Document]:
        return (replace(document, split="train") for document in source.documents())

    whole = replace(source, key=f"{source.key}-whole", documents=unsplit)
    texts = open_text_store(whole, data, folder)
    left_out = texts.is_duplicate
    if data.exclude:
        left_out = left_out | excluded_documents(data.exclude, texts)
    stream = _open_token_stream(texts, bundle.tokenizer, folder)
    return TokenSplit("all", texts, stream, np.flatnonzero(~left_out)), texts.identity


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
