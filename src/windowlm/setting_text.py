"""A setting's value as it is written on the command line."""

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
