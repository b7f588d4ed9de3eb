"""A trained model with its tokenizer and settings in one folder, as safetensors and JSON.

``config.json`` holds ``format``, ``model`` (the fields of ``ModelConfig``), ``vocabulary_size``,
``sequence_length``, ``source_identity``, ``tokenizer_identity``, ``data``, ``tokenizer`` and ``training``;
for a model that others trained `load` adds ``end_marks``, all ids that end a text.
The metadata of ``model.safetensors`` hold the hash of its tensors.
"""

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from windowlm.atomic_write import json_bytes, write_atomically
from windowlm.errors import UserError
from windowlm.interchange.adapter import TransformersModel, load_any_causal_model
from windowlm.interchange.config_in import ARCHITECTURES, InexpressibleError, read_foreign_config
from windowlm.interchange.weights_in import (
    check_finite,
    check_opens,
    check_shape,
    foreign_decoder,
    weight_files,
)
from windowlm.model.config import ModelConfig
from windowlm.model.cost import model_cost
from windowlm.model.decoder import Decoder
from windowlm.model_folder import CONFIG_NAME, WEIGHTS_NAME, ModelFolder, find_model_folder, own_shape
from windowlm.tokenization.tokenizer import Tokenizer
from windowlm.tokenization.transformers_files import end_marks, read_transformers_files

FORMAT = 1
HASH_KEY = "xxh3_128"  # in the metadata of the weights
_LAYER = re.compile(r"blocks\.(\d+)\.")
UNKNOWN_SOURCE = "unknown"  # of models that others trained
_JSON_NAMES: dict[type, str] = {dict: "an object", int: "a whole number", str: "a text"}
_CONFIG_KEYS: dict[str, type] = {
    "model": dict,
    "vocabulary_size": int,
    "sequence_length": int,
    "source_identity": str,
    "tokenizer_identity": str,
    "data": dict,
    "training": dict,
}


@dataclass(frozen=True)
class ScorableModel:
    """A model ready to be scored, ours or one of transformers in an adapter.

    Attributes:
        model: in evaluation mode, float32 weights, with the two parts of ``token_loss.LanguageModel``.
        tokenizer: encodes and decodes.
        config: content of a bundle's ``config.json``, as far as it is known.
        folder: where it was read from.
    """

    model: Decoder | TransformersModel
    tokenizer: Tokenizer
    config: dict[str, Any]
    folder: Path

    @property
    def window(self) -> int | list[int | None] | str | None:
        """The setting ``model.window``; a description of a model that is not ours."""
        if isinstance(self.model, Decoder):
            return self.model.config.window
        return f"attention of {self.model.model_type}"

    @property
    def receptive_field(self) -> int | None:
        """Tokens that can influence an output; None when a layer sees everything, or it is not known."""
        return None


@dataclass(frozen=True)
class Bundle(ScorableModel):
    """A model ready for use: ``model(tokens_BT)`` gives logits ``[B, T, V]``."""

    model: Decoder

    @property
    def receptive_field(self) -> int | None:
        """Tokens that can influence an output; None when a layer sees everything."""
        cost = model_cost(self.model.config, self.model.vocabulary_size, self.config["sequence_length"], 4)
        return cost.receptive_field


def save_bundle(
    folder: Path,
    model_state: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    tokenizer: Tokenizer,
    inside: Path | None = None,
) -> None:
    """Write a bundle; each file is the old one or the new one, and the weights come last.

    The weights carry their own hash, so that those of the save before, which a kill leaves beside a new
    config.json, are known to be whole too, and are loaded.

    Args:
        folder: made where it does not exist.
        model_state: ``state_dict`` of the model; of tied tensors the first is written.
        config: content of ``config.json`` without ``format``.
        tokenizer: the model's tokenizer.
        inside: a folder above it that is not made.

    Raises:
        OSError: a file cannot be written, which it names.
    """
    for name, content in tokenizer.files().items():
        write_atomically(folder / name, content, inside=inside)
    write_atomically(folder / CONFIG_NAME, json_bytes({"format": FORMAT, **config}), inside=inside)
    weights = _untied(model_state)
    write_atomically(folder / WEIGHTS_NAME, save(weights, {HASH_KEY: _hash(weights)}), inside=inside)


def load(path: str | Path, device: str | torch.device = "cpu") -> Bundle:
    """Read a model with its tokenizer.

    Args:
        path: a run's folder or its model folder; a folder in transformers' layout, such as an exported one;
            or the name of a model on the hub, ``owner/name``.
        device: where the model goes.

    Raises:
        UserError: a file is missing or damaged, as far as the hash of the weights tells, a tensor or the
            tokenizer is not of the model of ``config.json``, our layers cannot be that model, or the device
            is not here.
    """
    if not isinstance(path, str | Path):
        raise UserError(f"path={path!r}: a folder or the name of a model on the hub is allowed")
    return _load(find_model_folder(path), device_named(str(device)))


def _load(found: ModelFolder, device: str | torch.device) -> Bundle:
    if found.foreign:
        return _load_foreign(found, device)
    folder, config = found.path, _checked_config(found)
    shape = own_shape(found)
    try:
        tokenizer = Tokenizer.load(folder)
    except ValueError as error:
        raise UserError(f"{folder}: its tokenizer cannot be read: {error}") from None
    if tokenizer.vocabulary_size != config["vocabulary_size"]:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocabulary_size} tokens and config.json says "
            f"vocabulary_size={config['vocabulary_size']}; the files are of different models"
        )
    if tokenizer.identity != config["tokenizer_identity"]:
        raise UserError(
            f"checkpoint={folder}: the tokenizer there is not that of its training, though of as many "
            "tokens, so that these would mean something else; restore the tokenizer's files, or train again"
        )
    model = _decoder(shape, tokenizer.vocabulary_size, folder / WEIGHTS_NAME)
    return Bundle(model.to(device).eval(), tokenizer, config, folder)


def device_named(name: str) -> torch.device:
    """The device of a command's settings; ``auto`` is a GPU where there is one.

    Raises:
        UserError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"device={name}: there is no such device here; try device=auto") from None
    return device


def _checked_config(folder: ModelFolder) -> dict[str, Any]:
    path, config = folder.path / CONFIG_NAME, folder.config
    if config.get("format") != FORMAT:
        given = f"format={config['format']!r}" if "format" in config else "neither format nor model_type"
        raise UserError(
            f"{path}: {given}: windowlm's own has format={FORMAT}, that of transformers a model_type"
        )
    for key, kind in _CONFIG_KEYS.items():
        if key not in config:
            raise UserError(f"{path}: the key {key} is missing")
        if not isinstance(config[key], kind):
            raise UserError(f"{path}: {key}={config[key]!r}: must be {_JSON_NAMES[kind]}")
        if kind is int and not 1 <= config[key] < 2**31:
            raise UserError(f"{path}: {key}={config[key]}: must lie between 1 and 2,147,483,647")
    return config


def load_scorable(path: str | Path, device: str | torch.device = "cpu") -> ScorableModel:
    """Read a model to be scored: what `load` reads, and any other causal model that transformers opens.

    Raises:
        UserError: as `load`.
    """
    found = find_model_folder(path)
    if not found.foreign or found.config["model_type"] in ARCHITECTURES:
        with suppress(InexpressibleError):
            return _load(found, device)
    model = load_any_causal_model(found.path, device)
    tokenizer = foreign_tokenizer(found)
    # Where a model keeps its size is not known of all.
    if tokenizer.vocabulary_size > model.vocabulary_size:
        raise UserError(
            f"{found.path}: its tokenizer has {tokenizer.vocabulary_size} tokens and the model's embedding "
            f"{model.vocabulary_size} rows; the files are of different models"
        )
    config = _foreign_config(tokenizer, model.vocabulary_size, model.length)
    return ScorableModel(model, tokenizer, config, found.path)


def _foreign_config(tokenizer: Tokenizer, vocabulary_size: int, sequence_length: int) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "vocabulary_size": vocabulary_size,
        "sequence_length": sequence_length,
        "source_identity": UNKNOWN_SOURCE,
        "tokenizer_identity": tokenizer.identity,
        "data": {},
        "tokenizer": {"kind": "folder"},
        "training": {},
    }


def _load_foreign(folder: ModelFolder, device: str | torch.device) -> Bundle:
    files = weight_files(folder.path)
    found = read_foreign_config(folder.path, folder.config)
    model = foreign_decoder(found.model, found.vocabulary_size, files)
    tokenizer = foreign_tokenizer(folder)
    config = _foreign_config(tokenizer, found.vocabulary_size, found.sequence_length)
    config["model"] = asdict(found.model)
    try:
        # Some configs state -1 for none.
        marks = end_marks(folder.path)
        config["end_marks"] = [mark for mark in marks if 0 <= mark < found.vocabulary_size]
    except ValueError as error:
        raise UserError(f"{folder.path}: {error}") from None
    return Bundle(model.to(device).eval(), tokenizer, config, folder.path)


def foreign_tokenizer(folder: ModelFolder) -> Tokenizer:
    """The tokenizer of a folder in transformers' layout.

    Raises:
        UserError: it is missing, damaged, of another model, or not byte-level.
    """
    try:
        return read_transformers_files(folder.path)
    except ValueError as error:
        raise UserError(f"{folder.path}: its tokenizer cannot be read: {error}") from None


def _decoder(shape: ModelConfig, vocabulary_size: int, path: Path) -> Decoder:
    """The model with the weights of a file, compared with it before anything of the model's size is made."""
    try:
        check_opens(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file: {error}") from None
    # Those of earlier versions, or written by others, have no hash.
    if metadata.get(HASH_KEY, now := _hash(state)) != now:
        raise UserError(
            f"{path}: damaged: its tensors are not those of its hash; copy the file again. A run that kept "
            "its checkpoints writes it anew by resume=auto, once its evaluation/length.json is removed"
        )
    layers = len({found[1] for name in state if (found := _LAYER.match(name))})
    if layers != shape.layers:
        raise UserError(
            f"{path}: holds the weights of {layers} layers and config.json asks for {shape.layers}; the "
            "files are of different models"
        )
    with torch.device("meta"):
        outline = Decoder(shape, vocabulary_size)
    expected = outline.state_dict()
    written = {name for name, _ in (*outline.named_parameters(), *outline.named_buffers())}
    for name in sorted(written & expected.keys()):
        if name not in state:
            raise UserError(f"{path}: the tensor {name} is missing; config.json is of another model")
    for name, tensor in state.items():
        if name not in expected:
            raise UserError(f"{path}: the model has no tensor {name}; config.json is of another model")
        check_shape(f"{path}: {name}", tensor.shape, expected[name].shape)
        if expected[name].is_floating_point():
            check_finite(f"{path}: {name}", tensor)
        elif tensor.dtype != expected[name].dtype:
            raise UserError(f"{path}: {name} holds {tensor.dtype}, the model {expected[name].dtype}")
    model = Decoder(shape, vocabulary_size)
    model.load_state_dict(state, strict=False)
    return model


def _hash(state: Mapping[str, torch.Tensor]) -> str:
    """Hash of the names, types, shapes and bytes of contiguous tensors on the CPU."""
    hashed = xxhash.xxh3_128()
    for name, tensor in sorted(state.items()):
        hashed.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        hashed.update(tensor.flatten().view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def _untied(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state on the CPU with each tensor once, which is what safetensors can hold."""
    unique: dict[str, torch.Tensor] = {}
    seen: set[tuple[int, object]] = set()
    for name, tensor in state.items():
        identity = (tensor.untyped_storage().data_ptr(), tensor.storage_offset())
        if identity not in seen:
            seen.add(identity)
            unique[name] = tensor.detach().cpu().contiguous()
    return unique
