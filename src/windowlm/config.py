"""The whole configuration: one dataclass per command, checked in one call.

Each package's settings stand beside its code and check their own ranges; a ``ValueError`` raised there
reads ``field=value: what is allowed; try field=good value``. Here types are checked, unknown keys are
refused, and a mistake becomes a ``ConfigError`` that names the full key and the override that mends it.
Loading this module loads no torch.
"""

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_type_hints

from windowlm.data.config import DataConfig
from windowlm.errors import UserError
from windowlm.evaluation.config import EvaluationConfig, ScoredDataConfig
from windowlm.model.config import ModelConfig
from windowlm.tokenization.config import TokenizerConfig
from windowlm.training.config import (
    CheckpointConfig,
    LoggerConfig,
    OptimizerConfig,
    Precision,
    TrainerConfig,
)

Config = TypeVar("Config")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of ``python train.py``.

    Args:
        precision: Lightning's name; 16-mixed needs a GPU.
        seed: seed of weights, data order and dropout.
        run_dir: folder of the run, or of the runs under ``-m``.
        resume: ``auto`` continues the run in ``run_dir`` or starts it, a path starts from that run's last
            state in a new folder, null starts a new run.
        plan: check everything, print the plan and its cost, and stop.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    precision: Precision = "32-true"
    seed: int = 0
    run_dir: str
    resume: str | None = None
    plan: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed}: must lie in [0, 2**32); try seed=0")
        if self.precision == "16-mixed" and self.trainer.device == "cpu":
            raise ValueError(
                "precision=16-mixed: float16 training needs a GPU, and trainer.device=cpu; allowed on a CPU: "
                "32-true, bf16-mixed, bf16-true; try precision=bf16-mixed"
            )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Settings of ``python scripts/evaluate.py``.

    Args:
        checkpoint: run folder, or a model folder with its safetensors, config and tokenizer.
        data: documents to score; nothing given scores the run's own split.
        evaluation: context lengths, targets, precision.
        device: ``auto`` takes a GPU where there is one.
        output_dir: folder of the results; null is ``evaluation`` in the run's folder.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    checkpoint: str
    data: ScoredDataConfig = field(default_factory=ScoredDataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    output_dir: str | None = None


class ConfigError(UserError):
    """A user's mistake in a setting.

    Attributes:
        key: full path of the setting, such as ``model.kv_heads``; empty when no single one is meant.
        correction: override that mends it, such as ``model.kv_heads=4``; None when none is known.
    """

    def __init__(self, message: str, *, key: str = "", correction: str | None = None) -> None:
        super().__init__(message)
        self.key = key
        self.correction = correction


def known_keys(config_type: type) -> list[str]:
    """Full paths of every setting of a configuration dataclass, groups included."""
    keys: list[str] = []
    hints = get_type_hints(config_type)
    for entry in fields(config_type):
        keys.append(entry.name)
        for choice in (hints[entry.name], *get_args(hints[entry.name])):
            if is_dataclass(choice) and isinstance(choice, type):
                keys.extend(f"{entry.name}.{key}" for key in known_keys(choice))
    return keys


def unknown_key_error(key: str, value: str, keys: Iterable[str]) -> ConfigError:
    """The error for a key that does not exist, with the nearest ones that do."""
    keys = list(keys)
    leaf = key.rpartition(".")[2]
    same_leaf = [known for known in keys if known.rpartition(".")[2] == leaf]
    nearest = (same_leaf + difflib.get_close_matches(key, keys, n=3, cutoff=0.5))[:3]
    if not nearest:
        by_leaf = {known.rpartition(".")[2]: known for known in keys}
        nearest = [by_leaf[match] for match in difflib.get_close_matches(leaf, by_leaf, n=3, cutoff=0.6)]
    hint = f"; nearest: {', '.join(dict.fromkeys(nearest))}" if nearest else ""
    return ConfigError(
        f"{key}={value}: there is no setting {key}{hint}",
        key=key,
        correction=f"{nearest[0]}={value}" if nearest else None,
    )


def check_config(config_type: type[Config], values: Mapping[str, Any]) -> Config:
    """Build ``config_type`` from plain values, strictly.

    Args:
        config_type: dataclass of the command.
        values: nested dictionaries, lists and scalars as YAML gives them.

    Raises:
        ConfigError: first unknown key, wrong type or value out of range.
    """
    from pydantic import TypeAdapter, ValidationError

    adapter: TypeAdapter[Config] = TypeAdapter(config_type)
    try:
        # JSON mode: strict there still takes an object for a dataclass and a list for a tuple.
        return adapter.validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise _first_error(config_type, error.errors(), values) from None


def _first_error(config_type: type, errors: list[Any], values: Mapping[str, Any]) -> ConfigError:
    keys = known_keys(config_type)
    unknown = [error for error in errors if error["type"] == "unexpected_keyword_argument"]
    first = (unknown or errors)[0]
    key = _key_of(first["loc"], values)
    given = _shown(_value_at(values, key))
    if unknown:
        return unknown_key_error(key, given, keys)
    if first["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return ConfigError(f"{key}: has no value and none is assumed; give {key}=...", key=key)
    if first["type"] == "value_error":
        text = str(first["ctx"]["error"])
        field_name, _, rest = text.partition("=")
        full_key = f"{key}.{field_name}" if key else field_name
        message, _, advice = rest.rpartition("; try ")
        prefix = f"{key}." if key else ""
        return ConfigError(f"{full_key}={message}", key=full_key, correction=f"{prefix}{advice}")
    same_place = [error for error in errors if _key_of(error["loc"], values) == key]
    allowed = " or ".join(dict.fromkeys(_allowed(error) for error in same_place))
    if _may_be_null(config_type, key):
        allowed += " or null"
    return ConfigError(f"{key}={given}: allowed is {allowed}", key=key)


def _may_be_null(config_type: type, key: str) -> bool:
    hint: Any = config_type
    for part in key.split("."):
        groups = [
            choice for choice in (hint, *get_args(hint)) if is_dataclass(choice) and isinstance(choice, type)
        ]
        hint = get_type_hints(groups[0]).get(part) if groups else None
    return type(None) in get_args(hint)


def _key_of(location: tuple[Any, ...], values: Mapping[str, Any]) -> str:
    """Path of the location without the branches of unions, which pydantic puts between the keys."""
    path: list[str] = []
    here: Any = values
    for part in location:
        if isinstance(here, Mapping) and (part in here or part == location[-1]):
            path.append(str(part))
            here = here.get(part)
        elif isinstance(here, list) and isinstance(part, int):
            break
    return ".".join(path)


def _value_at(values: Mapping[str, Any], key: str) -> Any:
    here: Any = values
    for part in key.split("."):
        here = here.get(part) if isinstance(here, Mapping) else None
    return here


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _allowed(error: Any) -> str:
    kind: str = error["type"]
    if kind == "literal_error":
        return str(error["ctx"]["expected"]).replace("'", "")
    names = {
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "string_type": "a text",
        "bool_type": "true or false",
        "list_type": "a list",
        "none_required": "null",
        "tuple_type": "a list",
        "dataclass_type": "a group of settings",
        "dict_type": "a group of settings",
    }
    return names.get(kind, str(error["msg"]))
