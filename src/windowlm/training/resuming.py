"""Which checkpoint a run goes on from: the newest that is whole, if its state is that of the run."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from windowlm.config import ConfigError
from windowlm.errors import UserError
from windowlm.training.checkpoint_io import AtomicCheckpointIO, DamagedCheckpointError
from windowlm.training.lightning_module import STATE, LanguageModelModule


def read_newest(paths: Sequence[Path], module: LanguageModelModule) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint that is whole, and what it holds; what is wrong with newer ones is printed.

    Args:
        paths: the newest first, at least one.
        module: what is to go on from it.

    Raises:
        ConfigError: its state is not that of the module; see ``read_checkpoint``.
        UserError: none is whole.
    """
    damages = []
    for path in paths:
        try:
            saved = read_checkpoint(path, module)
        except DamagedCheckpointError as error:
            damages.append(str(error))
            continue
        for damage in damages:
            print(f"warning: {damage}; going on from {path} instead", file=sys.stderr)
        return path, saved
    raise UserError(
        f"{'; '.join(damages)}. No other state is left to go on from; the model folder of the run may still "
        "hold its last weights. Give another run_dir to start anew"
    )


def read_checkpoint(path: Path, module: LanguageModelModule) -> dict[str, Any]:
    """Read a checkpoint for ``module``.

    Raises:
        ConfigError: it holds another model, or was trained with another tokenizer or on other documents.
        DamagedCheckpointError: it is damaged.
        UserError: there is none.
    """
    saved = AtomicCheckpointIO().load_checkpoint(path)
    if STATE not in saved or "identities" not in saved[STATE]:
        raise ConfigError(f"resume: {path} was not written by this version of windowlm", key="resume")
    _check_shapes(module, saved["state_dict"], path)
    _check_identities(module, saved[STATE]["identities"], path)
    return saved


def _check_shapes(module: LanguageModelModule, saved: dict[str, Any], path: Path) -> None:
    own = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    other = {name: tuple(value.shape) for name, value in saved.items()}
    wrong = sorted(name for name in own.keys() | other.keys() if own.get(name) != other.get(name))
    if wrong:
        name = wrong[0]
        raise ConfigError(
            f"resume: {path} holds another model: {name} is {other.get(name)} there and {own.get(name)} "
            "here; give the model settings of that run",
            key="resume",
        )


def _check_identities(module: LanguageModelModule, saved: dict[str, str], path: Path) -> None:
    differing = [name for name, value in module.identities.items() if saved.get(name) != value]
    if differing:
        values = "; ".join(
            f"{name} {saved.get(name)} there, {module.identities[name]} here" for name in differing
        )
        raise ConfigError(
            f"resume: {path} was trained on other data: {values}. Give the data of that run as they were, or "
            "start a new run in another run_dir",
            key="resume",
        )
