"""The whole configuration: one dataclass per command, checked in one call.

Each package's settings stand beside its code and check their own ranges; a ``ValueError`` raised there
reads ``field=value: what is allowed; try field=good value``. Here types are checked, unknown keys are
refused, and a mistake becomes a ``ConfigError`` that names the full key and the override that mends it.
Loading this module loads no torch.
"""

import difflib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from windowlm.attention.picture import AttentionPicture
from windowlm.data.config import DataConfig
from windowlm.errors import UserError
from windowlm.evaluation.config import EvaluationConfig, ScoredDataConfig
from windowlm.generation.config import SamplingConfig, written_texts
from windowlm.model.config import ModelConfig
from windowlm.parallel.config import ParallelConfig
from windowlm.setting_text import flattened, setting_text
from windowlm.study.config import StudyConfig
from windowlm.tokenization.config import TokenizerConfig
from windowlm.training.config import (
    CheckpointConfig,
    LoggerConfig,
    OptimizerConfig,
    Precision,
    TrainerConfig,
)

Config = TypeVar("Config")
PROMPTS_TOGETHER = 16


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
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
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
        if not self.run_dir.strip():
            raise ValueError(
                f"run_dir={self.run_dir}: a run needs a folder of its own, and null names one by the time; "
                "try run_dir=null"
            )
        if self.resume is not None and not self.resume.strip():
            raise ValueError(f"resume={self.resume}: auto, the folder of a run, or null; try resume=auto")
        key = self.float16_key()
        if self.trainer.device == "cpu" and key is not None:
            raise ValueError(
                f"{key}=16-mixed: float16 needs a GPU, and trainer.device=cpu; allowed on a CPU: "
                f"32-true, bf16-mixed, bf16-true; try {key}=bf16-mixed"
            )
        if self.precision == "fp8" and self.trainer.device == "cpu":
            raise ValueError(
                "precision=fp8: float8 needs a GPU, and trainer.device=cpu; allowed on a CPU: 32-true, "
                "bf16-mixed, bf16-true; try precision=bf16-true"
            )
        if self.precision == "16-mixed" and self.trainer.loss == "pieces":
            raise ValueError(
                "trainer.loss=pieces: precision=16-mixed scales the loss before its gradient is taken, which "
                "pieces cannot wait for; try trainer.loss=auto"
            )

        self._check_window_warmup()
        self._check_parallel()

    def _check_parallel(self) -> None:
        """Refuse what a part of a model cannot do."""
        if self.parallel.kind != "fsdp2":
            return
        whole = "parallel=fsdp2 gives a process no whole matrices"
        if self.optimizer.averaging is not None:
            raise ValueError(
                f"optimizer.averaging={self.optimizer.averaging}: {whole} to average; allowed is null, or "
                "parallel=ddp; try optimizer.averaging=null"
            )
        if self.precision not in ("32-true", "bf16-mixed"):
            raise ValueError(
                f"precision={self.precision}: parallel=fsdp2 trains in 32-true or bf16-mixed; "
                "try precision=bf16-mixed"
            )

    def _check_window_warmup(self) -> None:
        start = self.trainer.window_warmup
        largest = max((window for window in self.model.layer_windows() if window is not None), default=0)
        if start is not None and start >= largest:
            what = f"the largest window is {largest}" if largest else "no layer has a window"
            good = largest // 2 or "null"
            raise ValueError(
                f"trainer.window_warmup={start}: windows grow from it, and {what}; "
                f"try trainer.window_warmup={good}"
            )

    def float16_key(self) -> str | None:
        """The first setting that asks for float16, which no CPU trains or scores in; None for none."""
        asked = {"precision": self.precision, "evaluation.precision": self.evaluation.precision}
        return next((key for key, precision in asked.items() if precision == "16-mixed"), None)


def _check_checkpoint(checkpoint: str) -> None:
    """Raise ValueError where it names nothing, which would be the working directory."""
    if not checkpoint.strip():
        raise ValueError(f"checkpoint={checkpoint}: it is empty; try checkpoint=RUN_DIR")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Settings of ``python scripts/evaluate.py``.

    Args:
        checkpoint: a run's folder, a model's folder in our layout or transformers', or a name of the hub.
        data: documents to score; nothing given scores the run's own split.
        evaluation: context lengths, targets, precision; what is not given is as in the run, but every target
            of other data is scored, in float32.
        study: what else is measured, of the same documents.
        device: ``auto`` takes a GPU where there is one.
        devices: processes that share the scoring on this machine, each with a GPU of its own where these are
            used; ``torchrun`` and ``srun`` start their own.
        output_dir: folder of the results; null is ``evaluation`` in the folder of the run or model, or
            ``evaluation_NAME`` for other data.
        wandb: whether all evaluations of the run, with their measures, go to its W&B run as well.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    checkpoint: str
    data: ScoredDataConfig = field(default_factory=ScoredDataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    study: StudyConfig = field(default_factory=StudyConfig)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    devices: int = 1
    output_dir: str | None = None
    wandb: bool = False

    def __post_init__(self) -> None:
        _check_checkpoint(self.checkpoint)
        if self.devices < 1:
            raise ValueError(f"devices={self.devices}: must be at least 1; try devices=1")
        if self.output_dir is not None and not self.output_dir.strip():
            raise ValueError(f"output_dir={self.output_dir}: a folder, or null; try output_dir=null")
        if self.output_dir is not None and self.wandb:
            raise ValueError(
                f"wandb=true: output_dir={self.output_dir} is not in the run, whose evaluations go to W&B; "
                "try wandb=false"
            )


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(SamplingConfig):
    """Settings of ``python scripts/generate.py``.

    Args:
        checkpoint: a run's folder, a model's folder in our layout or transformers', or a name of the hub.
        prompt: text to continue, as it stands.
        prompt_file: file that holds the text; ``-`` is standard input, as is no prompt at all.
        prompts_file: JSON lines with a ``prompt`` each, answered by JSON lines; ``-`` is standard input.
        batch_size: prompts of ``prompts_file`` that are served together.
        device: ``auto`` takes a GPU where there is one.
        precision: of weights and cache.
        compile: what reads prompts and what takes the tokens behind them, each as one graph.

    In ``stop`` a line break is ``\\n``; see `written_texts`.
    """

    checkpoint: str
    prompt: str | None = field(default=None, metadata={"verbatim": True})
    prompt_file: str | None = None
    prompts_file: str | None = None
    batch_size: int = PROMPTS_TOGETHER
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["32-true", "bf16-true"] = "32-true"
    compile: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_checkpoint(self.checkpoint)
        written_texts(self.stop)
        given = [
            name for name in ("prompt", "prompt_file", "prompts_file") if getattr(self, name) is not None
        ]
        if len(given) > 1:
            raise ValueError(
                f"{given[1]}={getattr(self, given[1])}: {given[0]} is given too, and prompts come from one "
                f"place; try {given[1]}=null"
            )
        if self.prompt == "":
            raise ValueError("prompt=: it is empty, and the model continues a text; try prompt=The")
        if self.batch_size < 1:
            raise ValueError(
                f"batch_size={self.batch_size}: must be at least 1; try batch_size={PROMPTS_TOGETHER}"
            )
        if self.batch_size != PROMPTS_TOGETHER and self.prompts_file is None:
            raise ValueError(
                f"batch_size={self.batch_size}: it is for the prompts of a prompts_file, and there is none; "
                f"try batch_size={PROMPTS_TOGETHER}"
            )


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Settings of ``python scripts/export.py``.

    Args:
        checkpoint: a run's folder, a model's folder in our layout or transformers', or a name of the hub.
        to: whose layout to write.
        out: folder to make.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    checkpoint: str
    to: Literal["transformers"] = "transformers"
    out: str

    def __post_init__(self) -> None:
        _check_checkpoint(self.checkpoint)
        if not self.out.strip():
            raise ValueError(f"out={self.out}: a folder to make; try out=exported")


@dataclass(frozen=True, kw_only=True)
class ShowAttentionConfig(AttentionPicture):
    """Settings of ``python scripts/show_attention.py``.

    Args:
        output_file: the PNG; null draws in the terminal alone.
    """

    output_file: str | None = "attention.png"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output_file is not None and not self.output_file.lower().endswith(".png"):
            raise ValueError(
                f"output_file={self.output_file}: a name that ends in .png, or null for the terminal alone, "
                "is allowed; try output_file=attention.png"
            )


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


@dataclass(frozen=True)
class Setting:
    """One key of a command's configuration.

    Attributes:
        key: full path, such as ``model.rotary.base``.
        kind: type annotation.
        default: of its dataclass; MISSING where a value must be given.
        under_nullable: a group above it may be null, so that the composed YAML may lack it.
        verbatim: a text that is taken as it stands, quotes and ``~`` included, as no path would be.
    """

    key: str
    kind: Any
    default: Any
    under_nullable: bool
    verbatim: bool

    @property
    def is_group(self) -> bool:
        """Whether it holds other settings."""
        return any(True for _ in _dataclasses(self.kind))

    @property
    def is_text(self) -> bool:
        """Whether its value is free text, such as a path."""
        return get_origin(self.kind) is not list and str in (self.kind, *get_args(self.kind))


def settings_of(config_type: type, prefix: str = "", under_nullable: bool = False) -> dict[str, Setting]:
    """Every setting of a configuration dataclass by its full key, groups included."""
    found: dict[str, Setting] = {}
    hints = get_type_hints(config_type)
    for entry in fields(config_type):
        key, kind = prefix + entry.name, hints[entry.name]
        verbatim = bool(entry.metadata.get("verbatim"))
        found.setdefault(key, Setting(key, kind, _default(entry), under_nullable, verbatim))
        for choice in _dataclasses(kind):
            nullable = under_nullable or choice is not kind
            for name, setting in settings_of(choice, f"{key}.", nullable).items():
                found.setdefault(name, setting)
    return found


def unknown_key_error(key: str, value: str, settings: Iterable[str]) -> ConfigError:
    """The error for a key that does not exist, with the nearest ones that do.

    Near are the keys of other groups with the same name, then those of the same group that are a word of it
    or have a name like it, then those of other groups.
    """
    known = list(settings)
    parent, _, leaf = key.rpartition(".")
    siblings = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == parent}
    others = {name.rpartition(".")[2]: name for name in reversed(known)}
    nearest = [name for name in known if name.rpartition(".")[2] == leaf]
    nearest += [siblings[word] for word in leaf.split("_") if word in siblings]
    nearest += [siblings[match] for match in difflib.get_close_matches(leaf, siblings, n=3, cutoff=0.6)]
    nearest += [others[match] for match in difflib.get_close_matches(leaf, others, n=3, cutoff=0.6)]
    nearest = list(dict.fromkeys(nearest))[:3]
    hint = ""
    if parent.partition(".")[0] == "model" and not any(name.startswith("model.") for name in known):
        # Another group's setting of the same name would be taken for the model's.
        nearest = []
        hint = f"; the checkpoint says it; train.py model.init_from=CHECKPOINT {key}={value} changes it"
    elif nearest:
        hint = f"; nearest: {', '.join(nearest)}"
    elif siblings:
        hint = f"; {parent + ' has' if parent else 'there are'} {', '.join(siblings)}"
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
        ConfigError: first unknown key, wrong type, value out of range or number that is not finite.
    """
    from pydantic import ValidationError

    kind: type = config_type
    try:
        # JSON mode: strict there still takes an object for a dataclass and a list for a tuple.
        config: Config = _adapter(kind).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise _first_error(config_type, error.errors(), values) from None
    for key, value in flattened(values).items():
        entries = value if isinstance(value, list) else [value]
        numbers = [number for entry in entries for number in flattened({key: entry}).values()]
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            good = _plain_default(settings_of(config_type)[key])
            raise ConfigError(
                f"{key}={setting_text(value)}: allowed is a finite number",
                key=key,
                correction=None if good is None else f"{key}={setting_text(good)}",
            )
    return config


@cache
def _adapter(config_type: type) -> Any:
    """Pydantic's `TypeAdapter` of the dataclass; making one takes longer than the check."""
    from pydantic import TypeAdapter

    return TypeAdapter(config_type)


def _first_error(config_type: type, errors: list[Any], values: Mapping[str, Any]) -> ConfigError:
    settings = settings_of(config_type)
    if (inside := _error_in_entry(config_type, errors, values, settings)) is not None:
        return inside
    errors = _of_chosen_kinds(errors)
    unknown = [error for error in errors if error["type"] == "unexpected_keyword_argument"]
    first = (unknown or errors)[0]
    if first["type"] == "json_invalid":
        return ConfigError("a setting holds bytes that are no UTF-8 text; rename that file or folder")
    key = _key_of(first["loc"], values, settings)
    given = _value_at(values, key)
    if unknown and key in settings:
        # Known in another branch of a union.
        return _wrong_kind(key, setting_text(given), values)
    if unknown:
        return unknown_key_error(key, setting_text(given), settings)
    if first["type"] == "value_error":
        text = str(first["ctx"]["error"])
        field_name, _, rest = text.partition("=")
        full_key = f"{key}.{field_name}" if key else field_name
        message, has_advice, advice = rest.rpartition("; try ")
        assert has_advice, text
        prefix = f"{key}." if key else ""
        return ConfigError(f"{full_key}={message}", key=full_key, correction=f"{prefix}{advice}")
    if first["type"].startswith("missing") and not isinstance(given, list):
        return ConfigError(f"{key}: must be given: {key}=VALUE", key=key)
    same_place = [error for error in errors if _key_of(error["loc"], values, settings) == key]
    entries = [error for error in same_place if any(isinstance(part, int) for part in error["loc"])]
    setting = settings[key]
    if get_origin(setting.kind) is tuple:
        allowed = f"a list of {len(get_args(setting.kind))} numbers"
    else:
        names = list(dict.fromkeys(_allowed(error) for error in entries or same_place))
        if type(None) in (_entry_kinds(setting.kind) if entries else get_args(setting.kind)):
            names.append("null")
        allowed = ("a list, each entry " if entries else "") + " or ".join(names)
    good = _good_value(setting, same_place, given)
    return ConfigError(
        f"{key}={setting_text(given)}: allowed is {allowed}",
        key=key,
        correction=None if good is None else f"{key}={setting_text(good)}",
    )


def _error_in_entry(
    config_type: type, errors: list[Any], values: Mapping[str, Any], settings: Mapping[str, Setting]
) -> ConfigError | None:
    """The error in a group that is an entry of a list, found as if the group stood in the list's place."""
    for error in errors:
        place = next((n for n, part in enumerate(error["loc"]) if isinstance(part, int)), None)
        key = _key_of(error["loc"], values, settings)
        entries = _value_at(values, key)
        if place is None or not isinstance(entries, list) or error["loc"][place] >= len(entries):
            continue
        number = error["loc"][place]
        entry, branch = entries[number], error["loc"][: place + 1]
        if not isinstance(entry, Mapping):
            continue
        alone = [
            {**other, "loc": (*branch[:-1], *other["loc"][place + 1 :])}
            for other in errors
            if other["loc"][: place + 1] == branch
        ]
        found = _first_error(config_type, alone, _replaced(values, key, entry))
        correction = None
        if found.correction is not None and found.correction.startswith(f"{key}."):
            name, _, good = found.correction.removeprefix(f"{key}.").partition("=")
            kept = {other: value for other, value in entry.items() if f"{key}.{other}" != found.key}
            mended = [*entries[:number], _replaced(kept, name, good), *entries[number + 1 :]]
            correction = f"{key}={setting_text(mended)}"
        message = str(found).replace(f"{key}.", f"{key}[{number}].")
        return ConfigError(message, key=key, correction=correction)
    return None


def _replaced(values: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy with another value at a full key."""
    name, _, rest = key.partition(".")
    return {**values, name: _replaced(values.get(name) or {}, rest, value) if rest else value}


def _wrong_kind(key: str, given: str, values: Mapping[str, Any]) -> ConfigError:
    """The error for a setting of a group whose ``kind`` is another, or not given."""
    kind = f"{key.rpartition('.')[0]}.kind"
    value = _value_at(values, kind)
    if value is None:
        return ConfigError(f"{kind}: must be given with {key}={given}: {kind}=VALUE", key=kind)
    return ConfigError(f"{key}={given}: {kind}={value} has no such setting", key=key)


def _of_chosen_kinds(errors: list[Any]) -> list[Any]:
    """Without the errors of branches of a union whose ``kind`` is not the given one, where one has it."""
    places: dict[tuple[Any, ...], set[tuple[Any, ...]]] = {}
    refused = {error["loc"][:-1] for error in errors if error["loc"][-1:] == ("kind",)}
    for branch in (error["loc"][:-1] for error in errors):
        places.setdefault(branch[:-1], set()).add(branch)
    dropped = {branch for branch in refused if places[branch[:-1]] - refused}
    return [error for error in errors if error["loc"][:-1] not in dropped]


def _good_value(setting: Setting, errors: list[Any], given: Any) -> Any:
    """A value near the given one that is allowed, else the default; None where there is neither."""
    kinds = {error["type"] for error in errors}
    if "int_type" in kinds and isinstance(given, float) and given.is_integer():
        return int(given)
    if "bool_type" in kinds and setting_text(given).lower() in ("yes", "y", "on", "1"):
        return True
    if kinds == {"list_type"} and isinstance(given, str):
        return [given]
    names = [name for error in errors for name in re.findall("'(.+?)'", str(error.get("ctx", "")))]
    near = difflib.get_close_matches(setting_text(given), names, n=1)
    return near[0] if near else _plain_default(setting)


def _plain_default(setting: Setting) -> Any:
    """The default where it can stand on a command line."""
    return None if setting.is_group or setting.default is MISSING else setting.default


def _default(entry: "Field[Any]") -> Any:
    return entry.default_factory() if entry.default_factory is not MISSING else entry.default


def _dataclasses(kind: Any) -> Iterator[type]:
    """The dataclasses that a type annotation names."""
    if isinstance(kind, type) and is_dataclass(kind):
        yield kind
    for choice in get_args(kind):
        yield from _dataclasses(choice)


def _entry_kinds(kind: Any) -> tuple[Any, ...]:
    """Types of a list's entries, where the annotation allows a list."""
    lists = [choice for choice in (kind, *get_args(kind)) if get_origin(choice) is list]
    return tuple(entry for choice in lists for entry in get_args(get_args(choice)[0]))


def _key_of(location: tuple[Any, ...], values: Mapping[str, Any], settings: Mapping[str, Setting]) -> str:
    """Path of the location without the branches of unions, which pydantic puts between the keys."""
    path: list[str] = []
    here: Any = values
    for part in location:
        if isinstance(here, Mapping) and (part in here or ".".join([*path, str(part)]) in settings):
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
        "tuple_type": "a list",
        "none_required": "null",
        "dataclass_type": "a group of settings",
        "dict_type": "a group of settings",
    }
    return names.get(kind, str(error["msg"]))
