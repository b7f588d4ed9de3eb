"""Words of a command line: made readable for Hydra's grammar, and mended where one is wrong.

Free text, such as a path, may hold any character; Hydra's grammar would read its commas, brackets and quotes.
"""

import os
import re
from collections.abc import Mapping, Sequence
from typing import get_args

from windowlm.config import ConfigError, Setting

# How a sweep begins in Hydra's own words, and one of texts that are quoted already.
SWEEP_SYNTAX = re.compile(r"""(choice|range|interval|glob|shuffle|sort|tag|extend_list)\(|['"]""")
NEVER_SWEPT = "run_dir"


def key_of(word: str) -> str:
    """The key of ``key=value``, without the marks that add or remove one."""
    return word.partition("=")[0].lstrip("+~")


def for_hydra(word: str, settings: Mapping[str, Setting], *, sweep: bool, sparse: bool = False) -> str:
    """An override as Hydra reads it: texts quoted, ``~`` expanded, and missing groups made.

    Args:
        word: ``key=value`` as the user gave it.
        settings: the command's settings.
        sweep: commas separate the values of a sweep.
        sparse: the YAML does not hold every setting.
    """
    key, separator, value = word.partition("=")
    setting = settings.get(key_of(word))
    if setting is None or not separator:
        return word
    if (sparse or setting.under_nullable) and not key.startswith("+") and not setting.is_group:
        # Add it where the composed YAML lacks it: there may be null where this setting's group would be.
        key = f"++{key}"
    if setting.verbatim:
        value = _in_quotes(_without_interpolation(value))
    elif setting.is_text and value not in ("", "null", "???"):
        swept = sweep and "," in value and setting.key != NEVER_SWEPT and not os.path.exists(value)
        if swept and not SWEEP_SYNTAX.match(value):
            value = ",".join(_quoted(text) for text in value.split(","))
        elif not swept:
            value = _quoted(value)
    return f"{key}={value}"


def made_room(word: str, settings: Mapping[str, Setting]) -> list[str]:
    """``key=null`` before a list that takes the place of a group, with which OmegaConf cannot merge it."""
    key, value = key_of(word), word.partition("=")[2]
    if key not in settings or not settings[key].is_group or "[" not in value:
        return []
    # Hydra's sweeper keeps one override of each spelling of a key.
    return [f"{'' if word.startswith('+') else '++'}{key}=null"]


def refuse_settings_of_no_group(words: Sequence[str], settings: Mapping[str, Setting]) -> None:
    """Refuse null or a list in the place of a group beside a setting of that group: one would be dropped.

    Args:
        words: overrides of one run.
        settings: the command's settings.

    Raises:
        ConfigError: ``model.rotary=null`` stands beside ``model.rotary.base=5``.
    """
    given = {key_of(word): word.partition("=")[2] for word in words}
    for group, whole in given.items():
        nullable = group in settings and type(None) in get_args(settings[group].kind)
        if not nullable or not (whole == "null" or whole.startswith("[")):
            continue
        for key, value in given.items():
            if key.startswith(f"{group}."):
                raise ConfigError(
                    f"{key}={value}: {group}={whole} stands beside it and has no such setting; "
                    "leave one of the two away",
                    key=key,
                )


def corrected(words: Sequence[str], key: str, correction: str) -> list[str]:
    """The words with the wrong setting replaced where it stands, or the right one added.

    Args:
        words: the command line's.
        key: the wrong setting.
        correction: ``key=value`` that takes its place.
    """
    replaced = {key, key_of(correction)}
    places = [place for place, word in enumerate(words) if key_of(word) in replaced]
    last = places[-1] if places else len(words)
    kept = [word for place, word in enumerate(words) if place not in places]
    position = last - sum(place < last for place in places)
    return [*kept[:position], correction, *kept[position:]]


def _quoted(text: str) -> str:
    """``text`` in single quotes, as Hydra's grammar and OmegaConf give it back."""
    exists = os.path.lexists(text)
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" and not exists:
        text = text[1:-1]
    return _in_quotes(_without_interpolation(text) if exists else os.path.expanduser(text))


def _without_interpolation(text: str) -> str:
    """The text with ``${`` escaped, which OmegaConf would look up."""
    return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + "\\${", text)


def _in_quotes(text: str) -> str:
    # A backslash is an escape only before a quote or at the end; elsewhere it stands for itself.
    escaped = re.sub(r"(\\*)('|\Z)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), text)
    return f"'{escaped}'"
