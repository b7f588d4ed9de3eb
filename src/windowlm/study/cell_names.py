"""Short names of the settings of a length study: what readers call them."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from windowlm.setting_text import setting_text

# Settings that a name mentions only where a cell has not the most common value.
MENTIONED = {
    "model.kv_heads": "{} KV heads",
    "model.layers": "{} layers",
    "data.sequence_length": "trained at {}",
    "precision": "{}",
    "tokenizer.kind": "{} tokenizer",
    "trainer.max_tokens": "{} tokens",
}
OF_ANOTHER_RUN = "folder"  # the tokenizer of the model that a run starts from
# How many tokens are usual depends on what a token is, and on whether a model only reads on in longer texts.
BUDGET, TOKENS_OF = "trainer.max_tokens", ("tokenizer.kind", "data.sequence_length")


def cell_names(cells: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """A name for each cell, told apart by windows, positions of full layers, and what is not as usual.

    Args:
        cells: settings by full key of each cell, by its overrides, which a name holds where it is needed.
    """
    names = {}
    for label, settings in cells.items():
        parts = [window_name(settings), *_positions(settings)]
        for key, text in MENTIONED.items():
            like = [other for other in cells.values() if _same(other, settings, TOKENS_OF)]
            usual = _most_common([other.get(key) for other in (like if key == BUDGET else cells.values())])
            if key in settings and settings[key] not in (usual, OF_ANOTHER_RUN):
                parts.append(text.format(setting_text(settings[key])))
        names[label] = ", ".join(parts)
    counts = Counter(names.values())
    return {label: name if counts[name] == 1 else f"{name} ({label})" for label, name in names.items()}


def window_name(settings: Mapping[str, Any]) -> str:
    """``full``, ``window 512``, or ``hybrid 128`` where some layers are full."""
    pattern = windows_of(settings)
    sizes = sorted({size for size in pattern if size is not None})
    if not sizes:
        return "full"
    kind = "hybrid" if None in pattern else "window" if len(sizes) == 1 else "windows"
    return f"{kind} {' and '.join(map(str, sizes))}"


def windows_of(settings: Mapping[str, Any]) -> list[int | None]:
    """The pattern of windows."""
    window = settings.get("model.window")
    return list(window) if isinstance(window, list) else [window]


def _positions(settings: Mapping[str, Any]) -> list[str]:
    """Of full layers alone: their rotary base decides their memory."""
    pattern = windows_of(settings)
    if None not in pattern:
        return []
    rotary = settings.get("model.rotary")
    if isinstance(rotary, list):
        layers = max(len(pattern), len(rotary))
        full = [
            rotary[layer % len(rotary)] for layer in range(layers) if pattern[layer % len(pattern)] is None
        ]
        bases = {None if one is None else one.get("base") for one in full}
        scaled = any(one is not None and one.get("scaling") for one in full)
    else:
        bases = {settings.get("model.rotary.base")}
        scaled = any(key.startswith("model.rotary.scaling.") for key in settings)
    texts = ["no positions" if base is None else f"base {base:,.0f}" for base in sorted(bases, key=str)]
    return ["; ".join(texts)] + ["scaled positions"] * scaled


def _same(one: Mapping[str, Any], other: Mapping[str, Any], keys: Sequence[str]) -> bool:
    return all(one.get(key) == other.get(key) for key in keys)


def _most_common(values: Sequence[Any]) -> Any:
    texts = [json.dumps(value, sort_keys=True) for value in values]
    return json.loads(Counter(texts).most_common(1)[0][0])
