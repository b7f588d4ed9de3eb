"""Settings as the command line writes them: full keys, and values as text."""

from collections.abc import Mapping
from typing import Any


def setting_text(value: Any) -> str:
    """``null``, ``true``, ``[64,null]``, ``{kind: linear, factor: 2.0}``; numbers and texts as they are."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {setting_text(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(setting_text, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Full keys, such as ``model.window``, and their values; an empty group is a value."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= flattened(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
