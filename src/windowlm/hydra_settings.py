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
# What no file changes; one may hold a sweep (`hydra.sweeper.params`) and what the command line may change.
FIXED: dict[str, tuple[Any, ...]] = {
    "callbacks": ({},),
    "job.chdir": (False,),
    "job.env_copy": ([],),
    "job.env_set": ({},),
    "job_logging": ({"version": 1, "root": None, "disable_existing_loggers": False},),
    "mode": (None,),
    "output_subdir": (".hydra", None),
    "searchpath": ([],),
    "sweep.subdir": ("${hydra.job.num}",),
    "sweeper._target_": ("hydra._internal.core_plugins.basic_sweeper.BasicSweeper",),
    "verbose": (False,),
}
# What names things to be made, in Hydra's settings and in those of Python's logging.
TARGET = "_target_"
MAKING_KEYS = (TARGET, "()", "class")
MAKING_VALUES = ("ext://", "cfg://")
PLUGINS = ("hydra._internal.core_plugins.", "hydra_plugins.")
# The rest is how Hydra itself writes to the screen.
MADE_BY_HYDRA = ("launcher._target_", "sweeper._target_")
OF_ITS_SCREEN = ("logging.StreamHandler", "ext://sys.stdout")


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


def refuse_changes_of_hydra(composed: Mapping[str, Any]) -> None:
    """Refuse settings of Hydra's own that no file may change, or that name something to be made.

    Args:
        composed: the node `hydra`, from whichever files and words.

    Raises:
        ConfigError: naming the first.
    """
    for key, usual in FIXED.items():
        value: Any = composed
        for name in key.split("."):
            value = value[name] if isinstance(value, Mapping) else None
        if not any(value == other and type(value) is type(other) for other in usual):
            raise _refusal(f"hydra.{key}")
    launcher = composed["launcher"]
    if not isinstance(launcher, Mapping):
        raise _refusal("hydra.launcher")
    if not str(launcher.get(TARGET)).startswith(PLUGINS):
        raise _refusal(f"hydra.launcher.{TARGET}")
    for key, value in _entries("", composed):
        by_key = key.rpartition(".")[2] in MAKING_KEYS
        by_value = isinstance(value, str) and value.startswith(MAKING_VALUES)
        if (by_key or by_value) and key not in MADE_BY_HYDRA and value not in OF_ITS_SCREEN:
            raise _refusal(f"hydra.{key}")


def _entries(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Each setting at and below a place, with its key."""
    parts: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        parts = value.items()
    elif isinstance(value, list):
        parts = enumerate(value)
    for name, part in parts:
        key = f"{place}.{name}" if place else str(name)
        yield key, part
        yield from _entries(key, part)


def _refusal(key: str) -> ConfigError:
    return ConfigError(
        f"{key}: cannot be set; of Hydra's own settings hydra.run.dir, hydra.sweep.dir, {LAUNCHER} and what "
        "is below hydra.launcher can, unless it names something to be made",
        key=key,
    )
