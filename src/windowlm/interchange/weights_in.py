"""Weights of a folder in transformers' layout, whole or in shards, for our decoder."""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from windowlm.errors import UserError
from windowlm.interchange.config_in import InexpressibleError
from windowlm.interchange.weight_names import output_bias_name, transformers_name
from windowlm.json_text import parse_json
from windowlm.model.config import ModelConfig
from windowlm.model.decoder import Decoder

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Tables that old versions wrote, which follow from the config.
DERIVED = ("rotary_emb.inv_freq",)
HEAD = transformers_name("head.weight")
LAYER = re.compile(r"model\.layers\.(\d+)\.")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, all of which are there.

    Raises:
        UserError: one is missing, or there are none, or the index names a file elsewhere.
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
        files = [folder / name for name in sorted(names)]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{index}: not an index of shards: weight_map, an object of tensors and their files, is allowed; "
            "download the folder again"
        ) from None
    for name, file in zip(sorted(names), files, strict=True):
        if Path(name).name != name or file.suffix != ".safetensors":
            raise UserError(
                f"{index}: {name!r} is no safetensors file beside it, and no other file is opened; download "
                "the folder again"
            )
    if missing := [file for file in files if not file.is_file()]:
        raise UserError(
            f"{missing[0]}: one of {len(files)} shards is missing ({len(missing)} in all); copy or download "
            "the folder again"
        )
    return files


def foreign_decoder(config: ModelConfig, vocabulary_size: int, files: Sequence[Path]) -> Decoder:
    """The model with the weights of the files, float32.

    Names and shapes are compared with those that the files state before anything of that size is made.

    Args:
        config: as ``config_in`` read it.
        vocabulary_size: rows of the embedding.
        files: of ``weight_files``.

    Raises:
        UserError: a file is damaged; a weight is missing, unknown, of another shape, or not finite.
        InexpressibleError: a bias that our layers lack is not zero.
    """
    _check_stated(config, vocabulary_size, files)
    model = Decoder(config, vocabulary_size)
    weights = {transformers_name(name): weight for name, weight in model.state_dict().items()}
    tied_head, absent = None, _output_biases(config)
    for file in files:
        for name, tensor in load_file(file).items():
            if name.endswith(DERIVED):
                continue
            check_finite(f"{file}: {name}", tensor)
            if name in absent:
                if tensor.any():
                    raise InexpressibleError(f"{file}: {name} is not zero, and our layers have no such bias")
            elif name == HEAD and config.tied_embeddings:
                tied_head = tensor
            else:
                weights[name].copy_(tensor)
    if tied_head is not None and not torch.equal(tied_head.to(weights[HEAD].dtype), weights[HEAD]):
        raise UserError(
            f"{files[0].parent}: tie_word_embeddings=true, and {HEAD} differs from the embedding; which of "
            "the two is the model's cannot be known"
        )
    return model


def _check_stated(config: ModelConfig, vocabulary_size: int, files: Sequence[Path]) -> None:
    stated: dict[str, tuple[Path, torch.Size]] = {}
    for file in files:
        try:
            check_opens(file)
            with safe_open(file, "pt") as content:
                for name in content.keys():  # noqa: SIM118  # it is no mapping
                    stated[name] = file, torch.Size(content.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: not a readable safetensors file: {error}") from None
    numbers = {int(found[1]) for name in stated if (found := LAYER.match(name))}
    if len(numbers) != config.layers:
        raise UserError(
            f"{files[0].parent}: the weights are of {len(numbers)} layers and config.json asks for "
            f"{config.layers}; the files are of different models"
        )
    with torch.device("meta"):
        expected = {
            transformers_name(name): weight.shape
            for name, weight in Decoder(config, vocabulary_size).state_dict().items()
        }
    output_biases = _output_biases(config)
    for name, (file, shape) in stated.items():
        if name.endswith(DERIVED):
            continue
        if name in output_biases:
            check_shape(f"{file}: {name}", shape, torch.Size([config.dim]))
            continue
        if name not in expected:
            raise UserError(f"{file}: the model of config.json has no weight {name}")
        check_shape(f"{file}: {name}", shape, expected[name])
    for name in expected:
        if name not in stated and not (name == HEAD and config.tied_embeddings):
            raise UserError(f"{files[0].parent}: the weight {name} is missing, which config.json asks for")


def _output_biases(config: ModelConfig) -> set[str]:
    """What others have beside biases of queries, keys and values; we can be them where it is zero."""
    return {output_bias_name(layer) for layer in range(config.layers)} if config.qkv_bias else set()


def check_opens(file: Path) -> None:
    """Raise the system's own error; safetensors says of each file that it cannot open that there is none."""
    with file.open("rb"):
        pass


def check_shape(what: str, shape: torch.Size, expected: torch.Size) -> None:
    """Refuse a weight of another shape.

    Raises:
        UserError: naming it.
    """
    if shape != expected:
        raise UserError(
            f"{what} has shape {list(shape)} and config.json asks for {list(expected)}; the files are of "
            "different models"
        )


def check_finite(what: str, tensor: torch.Tensor) -> None:
    """Refuse a weight of which float32 cannot be made, or that holds NaN or infinity then.

    Raises:
        UserError: naming it.
    """
    if tensor.dtype not in FLOATING:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATING)
        raise UserError(
            f"{what} holds {str(tensor.dtype).removeprefix('torch.')}: {names} are read; give the model as "
            "it was before it was quantised"
        )
    if not torch.isfinite(tensor.float()).all():
        raise UserError(
            f"{what} holds NaN or infinity, or more than float32 can; the training diverged, or the file is "
            "damaged"
        )
