"""Refuse a folder in transformers' layout whose files make transformers open or run what lies elsewhere.

transformers takes kernels from the hub where a config.json asks for an implementation of that name, weights
from a file that it names, classes that a quantisation names, and another model where an adapter lies beside.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from windowlm.errors import UserError
from windowlm.interchange.weights_in import weight_files
from windowlm.json_text import parse_json

ADAPTER_NAME = "adapter_config.json"
# Of transformers itself; every other name may be that of a kernel on the hub.
OWN_IMPLEMENTATIONS = (None, "eager", "sdpa")
REFUSED = {
    "quantization_config": "quantised weights are not read; give the model as it was before",
    "transformers_weights": "weights are read from model.safetensors or the shards of its index alone",
}


def check_self_contained(folder: Path) -> None:
    """Look at what a folder's JSON files name, before transformers does.

    Args:
        folder: in transformers' layout.

    Raises:
        UserError: naming the file and the entry that lead elsewhere, or weights that are no safetensors.
    """
    if (folder / ADAPTER_NAME).exists():
        raise UserError(
            f"{folder / ADAPTER_NAME}: an adapter names another model to open; merge the two and save them "
            "as one model"
        )
    path = folder / "config.json"
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    for name, value in _entries(config):
        if name in REFUSED and value is not None:
            raise UserError(f"{path}: {name}: {REFUSED[name]}")
        if name.endswith("_implementation") or "_implementation_" in name:
            for given in value.values() if isinstance(value, dict) else (value,):
                if given not in OWN_IMPLEMENTATIONS:
                    raise UserError(
                        f"{path}: {name}={given}: may name code on the hub; eager and sdpa are allowed, "
                        "or take the entry out"
                    )
    weight_files(folder)


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every name in objects within objects and lists, with its value."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield name, inner
            yield from _entries(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _entries(inner)
