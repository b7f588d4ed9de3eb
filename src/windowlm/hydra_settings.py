"""Which of Hydra's own settings may be changed: those that name no code.

Hydra makes what a `_target_` names under its callbacks, its logging, its sweeper and its launcher, so that a
file of settings that someone was handed could run code.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from windowlm.command_words import key_of
from windowlm.config import ConfigError

LAUNCHER = "hydra/launcher"
CHANGEABLE = ("hydra.run.dir", "hydra.sweep.dir", "hydra.launcher.")
# A sweep that a file holds; on the command line its settings stand themselves.
OF_FILES = ("hydra.sweeper.params",)
# What Hydra fills in itself.
FILLED_IN = ("hydra.overrides.", "hydra.runtime.", "hydra.job.override_dirname")
TARGET = "_target_"
ABSENT = object()


def refuse_words_for_hydra(words: Iterable[str]) -> None:
    """Refuse an override of a setting of Hydra's own that cannot be changed.

    Raises:
        ConfigError: naming it.
    """
    for word in words:
        key = key_of(word)
        of_hydra = key.startswith(("hydra.", "hydra/")) or key == "hydra"
        if of_hydra and key != LAUNCHER and not key.startswith(CHANGEABLE):
            raise _refusal(key)


def refuse_changes_of_hydra(composed: Mapping[str, Any], usual: Mapping[str, Any]) -> None:
    """Refuse settings of Hydra's own that cannot be changed or that name code, from whichever file they come.

    Args:
        composed: the node `hydra` as it was composed.
        usual: the same without anything from the user but the choice of a launcher.

    Raises:
        ConfigError: naming the first.
    """
    for key in _changes("hydra", composed, usual):
        if not key.startswith((*CHANGEABLE, *OF_FILES, *FILLED_IN)) or key.endswith(TARGET):
            raise _refusal(key)
    # The launcher's own names a plugin, and Hydra takes nothing else there; its option may hold others.
    for name, value in composed["launcher"].items():
        for key in _targets(f"hydra.launcher.{name}", value):
            raise _refusal(key)


def _changes(key: str, composed: Any, usual: Any) -> Iterator[str]:
    if not (isinstance(composed, Mapping) and isinstance(usual, Mapping)):
        if composed != usual:
            yield key
        return
    for name in sorted(composed.keys() | usual.keys(), key=str):
        yield from _changes(f"{key}.{name}", composed.get(name, ABSENT), usual.get(name, ABSENT))


def _targets(key: str, value: Any) -> Iterator[str]:
    """Keys below that Hydra would take for the name of something to make."""
    entries: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        entries = value.items()
    elif isinstance(value, list):
        entries = enumerate(value)
    for name, part in entries:
        if name == TARGET:
            yield f"{key}.{TARGET}"
        yield from _targets(f"{key}.{name}", part)


def _refusal(key: str) -> ConfigError:
    return ConfigError(
        f"{key}: cannot be set; of Hydra's own settings hydra.run.dir, hydra.sweep.dir, {LAUNCHER} and what "
        "is below hydra.launcher can, unless it names something to be made",
        key=key,
    )
