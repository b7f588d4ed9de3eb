"""A run that starts from a model: the settings that it takes from it, and its weights.

Loading this module loads no torch.
"""

from collections.abc import Set
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from windowlm.config import ConfigError
from windowlm.errors import UserError
from windowlm.model.config import ModelConfig
from windowlm.model_folder import ModelFolder, find_model_folder, own_shape
from windowlm.setting_text import setting_text
from windowlm.tokenization.config import TokenizerConfig

if TYPE_CHECKING:
    from windowlm.model.decoder import Decoder
    from windowlm.tokenization.tokenizer import Tokenizer

KEY = "model.init_from"
# Settings that no weight depends on.
WITHOUT_WEIGHTS = (
    "window",
    "attention_sinks",
    "logit_cap",
    "final_logit_cap",
    "attention_dropout",
    "norm_epsilon",
    "qk_norm_epsilon",
    "rotary",
    "backend",
)


def adopt_initial_model(values: dict[str, Any], given: Set[str]) -> dict[str, Any]:
    """Settings of a run with shape and tokenizer of the model that it starts from, where it does.

    A setting that differs from the default of a run, or stands on the command line, changes the model's where
    no weight depends on it, and is refused where the model has another.

    Args:
        values: composed settings.
        given: keys of the command line.

    Raises:
        UserError: the model cannot be found or be ours, or a setting does not fit its weights.
    """
    source = values["model"].get("init_from")
    if source is None:
        return values
    folder = find_model_folder(source, KEY)
    own, defaults = asdict(_shape(folder)), asdict(ModelConfig())
    own["init_from"] = source
    unfit: dict[str, Any] = {}
    for name, composed in values["model"].items():
        inside = {key for key in given if key.startswith(f"model.{name}.")}
        if name not in own:
            own[name] = composed  # unknown, which is said later
        elif inside or f"model.{name}" in given or composed != defaults[name]:
            wanted = _wanted(name, composed, own[name], inside, source)
            if wanted != own[name] and name not in WITHOUT_WEIGHTS:
                unfit[name] = wanted
            else:
                own[name] = wanted
    if unfit:
        raise _unfit(unfit, own, source)
    tokenizer = values["tokenizer"]
    is_given = any(key.partition(".")[0] == "tokenizer" for key in given)
    if not is_given and tokenizer == asdict(TokenizerConfig()):
        tokenizer = asdict(TokenizerConfig(kind="folder", path=str(folder.path)))
    return {**values, "model": own, "tokenizer": tokenizer}


def _shape(folder: ModelFolder) -> ModelConfig:
    if not folder.foreign:
        return own_shape(folder)
    from windowlm.interchange.config_in import read_foreign_config

    return read_foreign_config(folder.path, folder.config).model


def _unfit(unfit: dict[str, Any], own: dict[str, Any], source: str) -> ConfigError:
    """Settings that the weights do not fit, all of them at once, as a choice of ``model`` sets many."""
    asked, had = (
        ", ".join(f"model.{name}={setting_text(values[name])}" for name in unfit) for values in (unfit, own)
    )
    one = next(iter(unfit)) if len(unfit) == 1 else None
    advice = "" if one else " leave them away, and what chooses or sets them (model=...);"
    return ConfigError(
        f"{asked}: {KEY}={source} has {had}, and its weights fit no other;{advice} what may be changed is "
        f"{', '.join(WITHOUT_WEIGHTS)}",
        key="model" if one is None else f"model.{one}",
        correction=None if one is None else f"model.{one}={setting_text(own[one])}",
    )


def _wanted(name: str, composed: Any, own: Any, inside: Set[str], source: str) -> Any:
    """The value of a setting that is asked for."""
    wanted: Any = composed
    if inside and isinstance(composed, dict):
        # What a list says of all layers alike is as good as a group.
        alike = own[0] if isinstance(own, list) and len(own) == 1 else own
        if isinstance(own, list) and not isinstance(alike, dict):
            raise ConfigError(
                f"{min(inside)}: {KEY}={source} has a list there, {setting_text(own)}; give all of it as "
                f"model.{name}=[...]",
                key=f"model.{name}",
                correction=f"model.{name}={setting_text(own)}",
            )
        if isinstance(alike, dict):
            merged: dict[str, Any] = alike
            for key in inside:
                merged = _with(merged, composed, key.split(".")[2:])
            wanted = [merged] if isinstance(own, list) else merged
    return wanted


def _with(own: dict[str, Any], composed: dict[str, Any], path: list[str]) -> dict[str, Any]:
    """The model's group of settings with one setting as it was asked for."""
    name, *rest = path
    inner = own.get(name)
    if rest and isinstance(inner, dict) and isinstance(composed[name], dict):
        return {**own, name: _with(inner, composed[name], rest)}
    return {**own, name: composed[name]}


def load_initial_weights(model: "Decoder", tokenizer: "Tokenizer", source: str) -> None:
    """Copy the weights of the model that the run starts from.

    Args:
        model: in the shape that `adopt_initial_model` gave.
        tokenizer: of the run's data.
        source: folder or hub name.

    Raises:
        UserError: the weights cannot be read, or belong to another tokenizer.
    """
    from windowlm.bundle import load

    initial = load(source)
    if tokenizer.identity != initial.tokenizer.identity:
        raise UserError(
            f"tokenizer: the data are in the tokens of another tokenizer than {KEY}={source} "
            f"(of {tokenizer.vocabulary_size:,} tokens, and {initial.tokenizer.vocabulary_size:,}), so that "
            "its embeddings would mean something else; leave tokenizer away, and it is the model's"
        )
    model.load_state_dict(initial.model.state_dict())
