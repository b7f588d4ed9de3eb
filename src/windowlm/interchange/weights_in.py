"""Weights of a folder in transformers' layout, whole or in shards, for our decoder."""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from windowlm.errors import UserError
from windowlm.interchange.weight_names import transformers_name
from windowlm.json_text import parse_json
from windowlm.model.decoder import Decoder

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
# Tables that old versions wrote, which follow from the config.
DERIVED = ("rotary_emb.inv_freq",)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, all of which are there.

    Raises:
        UserError: one is missing, or there are none.
    """
    if (folder / WEIGHTS_NAME).is_file():
        return [folder / WEIGHTS_NAME]
    index = folder / INDEX_NAME
    if not index.is_file():
        raise UserError(
            f"checkpoint={folder}: neither {WEIGHTS_NAME} nor {INDEX_NAME} is there; weights are read from "
            "safetensors alone, as other files may run code: model.save_pretrained(FOLDER) writes them"
        )
    try:
        names = set(parse_json(index.read_bytes())["weight_map"].values())
        files = [folder / Path(name).name for name in sorted(names)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not an index of shards: {error!r}") from None
    if missing := [file for file in files if not file.is_file()]:
        raise UserError(
            f"{missing[0]}: one of {len(files)} shards is missing ({len(missing)} in all); copy or download "
            "the folder again"
        )
    return files


def load_foreign_weights(model: Decoder, files: Iterable[Path]) -> None:
    """Copy weights into the model, in its dtype.

    Args:
        model: as ``config_in`` shaped it.
        files: of ``weight_files``.

    Raises:
        UserError: a file is damaged; a weight is missing, unknown, of another shape, or not finite.
    """
    expected = {transformers_name(name): weight for name, weight in model.state_dict().items()}
    found: set[str] = set()
    head, tied_head = transformers_name("head.weight"), None
    file = Path()
    for file in files:
        try:
            state = load_file(file)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: not a readable safetensors file: {error}") from None
        for name, tensor in state.items():
            if name.endswith(DERIVED):
                continue
            if name not in expected:
                raise UserError(f"{file}: the model of config.json has no weight {name}")
            check_weight(f"{file}: {name}", tensor, expected[name])
            found.add(name)
            if name == head and model.config.tied_embeddings:
                tied_head = tensor
            else:
                expected[name].copy_(tensor)
    if tied_head is not None and not torch.equal(tied_head.to(expected[head].dtype), expected[head]):
        raise UserError(
            f"{file.parent}: tie_word_embeddings=true, and {head} differs from the embedding; which of the "
            "two is the model's cannot be known"
        )
    for name in expected:
        if name not in found and not (model.config.tied_embeddings and name == head):
            raise UserError(f"{file.parent}: the weight {name} is missing, which config.json asks for")


def check_weight(what: str, tensor: torch.Tensor, expected: torch.Tensor) -> None:
    """Refuse a weight of another shape, or one that holds NaN or infinity.

    Raises:
        UserError: naming it.
    """
    if tensor.shape != expected.shape:
        raise UserError(
            f"{what} has shape {list(tensor.shape)} and config.json asks for {list(expected.shape)}; the "
            "files are of different models"
        )
    if not torch.isfinite(tensor).all():
        raise UserError(f"{what} holds NaN or infinity; the training diverged, or the file is damaged")
