"""Shapes of our model for the config.json of a Llama, Mistral, Qwen2, Qwen3 or SmolLM3.

transformers reads the file, with its defaults and its older names; what our layers lack is refused.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from windowlm.attention.config import (
    LinearScaling,
    Llama3Scaling,
    RotaryConfig,
    RotaryScaling,
    YarnScaling,
)
from windowlm.attention.window_conventions import from_transformers
from windowlm.errors import UserError
from windowlm.json_text import is_count
from windowlm.model.config import ModelConfig

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
BY_LAYER = ("qwen2", "qwen3", "smollm3")  # which of them have layer_types
LONGEST_REASON = 300
MOST_LAYERS = 10_000
Entry = TypeVar("Entry")


class InexpressibleError(UserError):
    """What our layers cannot be, and transformers' may: such a model can be scored, if not loaded as ours."""


@dataclass(frozen=True, kw_only=True)
class ForeignConfig:
    """What a config.json of transformers says.

    Attributes:
        model: the shape.
        vocabulary_size: rows of the embedding; the tokenizer may have fewer.
        sequence_length: largest number of positions that the model knows.
        model_type: name of the architecture.
    """

    model: ModelConfig
    vocabulary_size: int
    sequence_length: int
    model_type: str


def read_foreign_config(folder: Path, stated: Mapping[str, Any]) -> ForeignConfig:
    """Read a folder's config.json.

    Args:
        folder: in transformers' layout.
        stated: content of its config.json.

    Raises:
        UserError: another architecture, a part that our layers lack, a damaged file, or transformers is not
            installed.
    """
    path, model_type = folder / "config.json", stated.get("model_type")
    if model_type not in ARCHITECTURES:
        raise UserError(
            f"{path}: model_type={model_type}: our layers can be {', '.join(ARCHITECTURES)}; any causal "
            "model of transformers can be scored, though: python scripts/evaluate.py checkpoint=FOLDER"
        )
    for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads"):
        if (number := stated.get(name)) is not None and not is_count(number):
            raise UserError(f"{path}: {name}={number!r}: whole numbers from 1 on are read")
    if (layers := stated.get("num_hidden_layers") or 0) > MOST_LAYERS:
        # transformers and our shape list something for each.
        raise UserError(f"{path}: num_hidden_layers={layers}: at most {MOST_LAYERS:,} are read")
    try:
        from transformers import AutoConfig
    except ImportError:
        raise UserError(
            f"{path}: reading it needs transformers: pip install 'windowlm[transformers]'"
        ) from None
    try:
        theirs = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        shape = _shape(theirs)
    except UserError as error:
        raise type(error)(f"{path}: {error}") from None
    except Exception as error:  # of transformers and of what it checks with
        reason = " ".join(str(error).split())[:LONGEST_REASON]
        raise UserError(f"{path}: cannot be read as the config of a {model_type}: {reason}") from None
    for name in ("max_position_embeddings", "vocab_size"):
        if not is_count(number := getattr(theirs, name)):
            raise UserError(f"{path}: {name}={number!r}: whole numbers from 1 on are read")
    return ForeignConfig(
        model=shape,
        vocabulary_size=theirs.vocab_size,
        sequence_length=theirs.max_position_embeddings,
        model_type=theirs.model_type,
    )


def _shape(theirs: Any) -> ModelConfig:
    _refuse_unknown_parts(theirs)
    for name in ("hidden_size", "num_attention_heads"):
        if not is_count(number := getattr(theirs, name)):
            raise UserError(f"{name}={number!r}: whole numbers from 1 on are read")
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    has_norms = theirs.model_type == "qwen3"
    return ModelConfig(
        layers=theirs.num_hidden_layers,
        dim=theirs.hidden_size,
        heads=theirs.num_attention_heads,
        kv_heads=theirs.num_key_value_heads,
        head_dim=head_dim,
        feed_forward_dim=theirs.intermediate_size,
        window=_pattern(_windows(theirs)),
        qk_norm=has_norms,
        qk_norm_epsilon=float(theirs.rms_norm_eps) if has_norms else None,
        qkv_bias=theirs.model_type == "qwen2" or _has_biases(theirs),
        tied_embeddings=theirs.tie_word_embeddings,
        attention_dropout=float(theirs.attention_dropout or 0),
        norm_epsilon=float(theirs.rms_norm_eps),
        rotary=_pattern(_rotaries(theirs)),
    )


def _has_biases(theirs: Any) -> bool:
    """Whether biases are ours, but for that of the output, which must be zero."""
    return theirs.model_type in ("llama", "smollm3") and getattr(theirs, "attention_bias", False) is True


def _refuse_unknown_parts(theirs: Any) -> None:
    ours = {"hidden_act": "silu", "attention_bias": _has_biases(theirs), "mlp_bias": False}
    for name, known in ours.items():
        value = getattr(theirs, name, known)
        if value != known:
            raise InexpressibleError(f"{name}={value}: our layers have {name}={known} alone")
    if getattr(theirs, "quantization_config", None) is not None:
        raise UserError(
            "quantization_config: quantised weights are not read; give the model as it was before"
        )


def _windows(theirs: Any) -> list[int | None]:
    layers, sliding = theirs.num_hidden_layers, getattr(theirs, "sliding_window", None)
    kinds: Any = getattr(theirs, "layer_types", None)
    if theirs.model_type == "llama":
        sliding = None
    if theirs.model_type not in BY_LAYER:
        kind = "full_attention" if sliding is None else "sliding_attention"
        if kinds is not None and set(kinds) != {kind}:
            raise UserError(f"layer_types={kinds}: a {theirs.model_type} has layers of one kind, {kind}")
        return [from_transformers(sliding).window] * layers
    if len(kinds) != layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise UserError(
            f"layer_types={kinds}: full_attention or sliding_attention for each of {layers} layers is allowed"
        )
    if "sliding_attention" in kinds and (sliding is None or not theirs.use_sliding_window):
        raise UserError(
            f"layer_types has sliding_attention beside use_sliding_window={theirs.use_sliding_window}, "
            f"sliding_window={sliding}: versions of transformers differ in what these layers see; give both"
        )
    windows = {"full_attention": None, "sliding_attention": from_transformers(sliding).window}
    return [windows[kind] for kind in kinds]


def _rotaries(theirs: Any) -> list[RotaryConfig | None]:
    rotary = _rotary(theirs)
    if theirs.model_type != "smollm3":
        return [rotary] * theirs.num_hidden_layers
    if len(theirs.no_rope_layers) < theirs.num_hidden_layers:
        raise UserError(
            f"no_rope_layers={theirs.no_rope_layers}: an entry for each of {theirs.num_hidden_layers} layers "
            "is allowed"
        )
    return [rotary if rotates else None for rotates in theirs.no_rope_layers[: theirs.num_hidden_layers]]


def _rotary(theirs: Any) -> RotaryConfig:
    given = getattr(theirs, "rope_parameters", None)
    if given is None:  # versions before 5
        given = {"rope_theta": theirs.rope_theta, **(getattr(theirs, "rope_scaling", None) or {})}
    if any(isinstance(value, dict) for value in given.values()):
        raise UserError(f"rope_parameters={json.dumps(given)}: rotations by kind of layer are not read")
    rest = {name: value for name, value in given.items() if value is not None}
    base = float(rest.pop("rope_theta"))
    kind = rest.pop("rope_type", rest.pop("type", "default"))
    rest.pop("type", None)
    if rest.pop("partial_rotary_factor", 1.0) != 1:
        raise UserError(
            f"partial_rotary_factor={given['partial_rotary_factor']}: a {theirs.model_type} rotates whole "
            "heads"
        )
    try:
        scaling = _scaling(kind, rest, theirs)
    except UserError:
        raise
    except ValueError:
        # It speaks of our names, and advises what would be another model.
        raise InexpressibleError(
            f"rope_parameters={json.dumps(given)}: our layers have no such rotation"
        ) from None
    if rest:
        raise UserError(f"rope_parameters={json.dumps(given)}: {next(iter(rest))} is not read beside {kind}")
    return RotaryConfig(base=base, scaling=scaling)


def _scaling(kind: str, rest: dict[str, Any], theirs: Any) -> RotaryScaling | None:
    """The scaling, whose parameters are taken out of ``rest``."""
    if kind == "default":
        return None
    if kind == "linear":
        return LinearScaling(kind="linear", factor=float(rest.pop("factor")))
    if kind not in ("yarn", "llama3"):
        raise InexpressibleError(
            f"rope_type={kind}: default, linear, yarn and llama3 are read; dynamic ones alter the rotation "
            "of a text while it grows"
        )
    original = int(rest.pop("original_max_position_embeddings", theirs.max_position_embeddings))
    factor = float(rest.pop("factor"))
    if kind == "llama3":
        return Llama3Scaling(
            kind="llama3",
            factor=factor,
            original_length=original,
            slow=float(rest.pop("low_freq_factor")),
            fast=float(rest.pop("high_freq_factor")),
        )
    attention_factor, truncate = rest.pop("attention_factor", None), rest.pop("truncate", True)
    if not isinstance(truncate, bool):
        raise UserError(f"rope_parameters: truncate={truncate!r}: true or false is allowed")
    mscales = {name: rest.pop(name, None) for name in ("mscale", "mscale_all_dim")}
    if attention_factor is not None or not all(mscales.values()):
        mscales = {}  # transformers reads them where both are given, and no attention factor
    return YarnScaling(
        kind="yarn",
        factor=factor,
        original_length=original,
        fast=float(rest.pop("beta_fast", 32)),
        slow=float(rest.pop("beta_slow", 1)),
        truncate=truncate,
        attention_factor=None if attention_factor is None else float(attention_factor),
        **{name: float(value) for name, value in mscales.items()},
    )


def _pattern(layers: Sequence[Entry]) -> Any:
    """The entry of all layers, or the shortest list that repeats over them."""
    for length in range(1, len(layers) + 1):
        if all(entry == layers[number % length] for number, entry in enumerate(layers)):
            return layers[0] if length == 1 else list(layers[:length])
    raise AssertionError("a model has a layer")
