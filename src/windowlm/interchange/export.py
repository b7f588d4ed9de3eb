"""A trained model as a folder that transformers opens without further code."""

import math
import os
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from windowlm.atomic_write import json_bytes, obstacle, sync_path
from windowlm.errors import UserError
from windowlm.interchange.config_out import transformers_config
from windowlm.interchange.weight_names import output_bias_name, transformers_name
from windowlm.model.config import ModelConfig
from windowlm.model.decoder import Decoder
from windowlm.tokenization.tokenizer import Tokenizer
from windowlm.tokenization.transformers_files import write_transformers_files

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
CARD_NAME = "README.md"


def check_out(out: Path) -> None:
    """Refuse a folder that exists.

    Raises:
        UserError: it does, or its parent cannot be written.
    """
    if os.path.lexists(out):
        raise UserError(
            f"out={out}: it exists, and an export overwrites nothing; give a folder that does not"
        )
    if (reason := obstacle(out.absolute().parent)) is not None:
        raise UserError(f"out={out}: cannot be written: {reason}; give another folder")


def export_to_transformers(
    model: Decoder,
    tokenizer: Tokenizer,
    out: Path,
    *,
    sequence_length: int,
    further_ends: Collection[int] = (),
    card: str,
    pictures: Mapping[str, bytes] | None = None,
) -> dict[str, Any]:
    """Write config.json, model.safetensors, the tokenizer's files and the model card, all or nothing.

    Args:
        model: float32 weights.
        tokenizer: the model's.
        out: a folder that does not exist.
        sequence_length: tokens of a training sequence.
        further_ends: ids that end a text beside the tokenizer's.
        card: content of the README.md.
        pictures: files that the card shows, by name.

    Returns:
        The content of config.json.

    Raises:
        UserError: ``out`` exists or cannot be written, or no architecture of transformers can express the
            model.
    """
    check_out(out)
    config = transformers_config(
        model.config,
        vocabulary_size=model.vocabulary_size,
        sequence_length=sequence_length,
        end_of_document=tokenizer.end_of_document,
        further_ends=further_ends,
    )
    weights = exported_weights(model)
    try:
        _write(out, tokenizer, config, card, weights, pictures or {})
    except OSError as error:
        raise UserError(f"out={out}: cannot be written: {error.strerror or error}") from None
    return config


def _write(
    out: Path,
    tokenizer: Tokenizer,
    config: dict[str, Any],
    card: str,
    weights: dict[str, torch.Tensor],
    pictures: Mapping[str, bytes],
) -> None:
    made = [parent for parent in out.parents if not parent.exists()]
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        write_transformers_files(tokenizer, partial)
        for name, content in {
            CONFIG_NAME: json_bytes(config),
            CARD_NAME: card.encode(),
            **pictures,
        }.items():
            (partial / name).write_bytes(content)
        save_file(weights, partial / WEIGHTS_NAME, {"format": "pt"})
        # Safetensors lets the owner alone read it.
        shutil.copymode(partial / CONFIG_NAME, partial / WEIGHTS_NAME)
        for file in partial.iterdir():
            sync_path(file)
        sync_path(partial)
        check_out(out)
        partial.rename(out)
        sync_path(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in made:  # those that hold nothing
            with suppress(OSError):
                parent.rmdir()


def exported_weights(model: Decoder) -> dict[str, torch.Tensor]:
    """The weights on the CPU under the names of transformers, tied ones once."""
    config = model.config
    weights = {}
    for name, weight in model.named_parameters():
        kept = weight.detach().cpu()
        if config.qk_norm and name.endswith(("attention.query.weight", "attention.key.weight")):
            kept = kept * _norm_scale(config)
        weights[transformers_name(name)] = kept.contiguous()
    if config.qkv_bias:
        weights |= {output_bias_name(layer): torch.zeros(config.dim) for layer in range(config.layers)}
    return weights


def _norm_scale(config: ModelConfig) -> float:
    """Factor on queries and keys after which their norms may use the epsilon of the other norms.

    With ``a = sqrt(e / e')``, ``a x / sqrt(a^2 mean(x^2) + e)`` is ``x / sqrt(mean(x^2) + e')``.
    """
    own = torch.finfo(torch.float32).eps if config.qk_norm_epsilon is None else config.qk_norm_epsilon
    return math.sqrt(config.norm_epsilon / own)
