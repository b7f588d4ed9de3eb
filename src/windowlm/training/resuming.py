"""Which checkpoint a run goes on from: the newest that is whole, if its state is that of the run."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from windowlm.config import ConfigError
from windowlm.errors import UserError
from windowlm.training.checkpoint_io import AtomicCheckpointIO, DamagedCheckpointError
from windowlm.training.lightning_module import STATE, LanguageModelModule
from windowlm.training.run_folder import changed_settings, is_changeable

KINDS: dict[str, type | tuple[type, ...]] = {
    STATE: dict,
    "state_dict": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "callbacks": dict,
    "loops": dict,
    "DocumentDataModule": dict,
    "epoch": int,
    "global_step": int,
    "pytorch-lightning_version": str,
}
KINDS_OF_STATE: dict[str, type | tuple[type, ...]] = {
    "identities": dict,
    "batches_trained": int,
    "seconds_trained": (int, float),
    "validation_loss": float,
    "validation_bits_per_byte": float,
    "train_sums": dict,
    "visible_pairs": int,
    "skipped_steps": int,
}
KINDS_OF_CALLBACKS: dict[str, type | tuple[type, ...]] = {"MetricsWriter": dict, "CheckpointWriter": dict}


def read_newest(
    paths: Sequence[Path], module: LanguageModelModule, *, of_same_settings: bool = False
) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint that is whole, and what it holds; what is wrong with newer ones is printed.

    Args:
        paths: the newest first, at least one.
        module: what is to go on from it.
        of_same_settings: whether one that other settings have made is passed over like a damaged one.

    Raises:
        ConfigError: its state is not that of the module; see ``read_checkpoint``.
        UserError: none is whole.
    """
    damages = []
    for path in paths:
        try:
            saved = read_checkpoint(path, module)
            if of_same_settings:
                _check_settings(module, saved[STATE].get("settings"), path)
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
    _check_kinds(saved, path)
    _check_shapes(module, saved["state_dict"], path)
    _check_identities(module, saved[STATE]["identities"], path)
    return saved


def _check_kinds(saved: Any, path: Path) -> None:
    """Refuse a file of other things: its hash tells damage alone, and may be right in anybody's file."""
    wrong = _of_another_kind(saved, KINDS, "")
    if not wrong:
        wrong = [
            *_of_another_kind(saved[STATE], KINDS_OF_STATE, f"{STATE}."),
            *_of_another_kind(saved["callbacks"], KINDS_OF_CALLBACKS, "callbacks."),
            *_of_another_kind(saved["DocumentDataModule"], {"next_batch": int}, "DocumentDataModule."),
            *(
                f"state_dict.{name}"
                for name, value in saved["state_dict"].items()
                if not torch.is_tensor(value)
            ),
        ]
    if not wrong:
        counts = {
            f"{STATE}.batches_trained": saved[STATE]["batches_trained"],
            "DocumentDataModule.next_batch": saved["DocumentDataModule"]["next_batch"],
        }
        wrong = [name for name, count in counts.items() if not 0 <= count < 2**62]
    if wrong:
        raise ConfigError(
            f"resume: {path} was not written by this version of windowlm: {wrong[0]} is missing or of "
            "another kind",
            key="resume",
        )


def _of_another_kind(content: Any, kinds: Mapping[str, type | tuple[type, ...]], place: str) -> list[str]:
    if not isinstance(content, dict):
        return [place.rstrip(".") or "its content"]
    return [f"{place}{name}" for name, kind in kinds.items() if not isinstance(content.get(name), kind)]


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


def _check_settings(module: LanguageModelModule, saved: object, path: Path) -> None:
    # States of earlier versions do not say.
    if not isinstance(saved, dict):
        return
    try:
        plain = json.loads(json.dumps(saved))
    except (TypeError, ValueError):
        raise DamagedCheckpointError(f"resume={path}: its settings are none") from None
    lasting = {key: value for key, value in plain.items() if not is_changeable(key)}
    for key, ours, theirs in changed_settings(lasting, module.settings):
        raise DamagedCheckpointError(f"resume={path}: not of this run: {key}={theirs} made it, not {ours}")


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
