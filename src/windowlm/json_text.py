"""JSON of files that anybody may have written: whatever is wrong with it is a ValueError."""

import json
from typing import Any

LARGEST = 1e100  # of numbers in results: its square is finite in float64


def is_number(value: object, least: float = -LARGEST) -> bool:
    """Whether a value of JSON is a number from ``least`` on with which results can be computed."""
    return not isinstance(value, bool) and isinstance(value, int | float) and least <= value <= LARGEST


def is_count(value: object) -> bool:
    """Whether it is a whole number from 1 on that fits into 64 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**63


def has_text(value: object) -> bool:
    """Whether all strings in a value of JSON are text; JSON may also say halves of characters."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        return False
    return True


def parse_json(text: str | bytes, *, keys_once: bool = False) -> Any:
    """The value that ``text`` says.

    Args:
        text: JSON.
        keys_once: refuse an object that has a key twice; else the last counts.

    Raises:
        ValueError: it is not JSON, nested deeper than Python can read, or holds a longer number.
    """
    try:
        return json.loads(text, object_pairs_hook=_once if keys_once else None)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except ValueError as error:
        if "int_max_str_digits" not in str(error):
            raise
        raise ValueError("a number in it has more digits than Python reads") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"the key {key} stands in an object twice")
        values[key] = value
    return values
