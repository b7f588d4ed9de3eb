"""The architecture of transformers that says what a model of ours is, and its config.json.

| layers                                              | architecture |
|-----------------------------------------------------|--------------|
| alike, without norms of queries and keys            | Mistral      |
| the same, but windowed and full ones, NoPE, biases  | SmolLM3      |
| with norms of queries and keys, windowed or full    | Qwen3        |

Their ``sliding_window`` counts the query as ours does, and all windowed layers of a model share it.
Qwen2 has biases on queries, keys and values too, but transformers opens every tokenizer beside it as Qwen's.
SmolLM3's come with one of the output, which is written as zeros.
"""

import json
from collections.abc import Collection
from dataclasses import asdict
from typing import Any

from windowlm.attention.config import (
    LinearScaling,
    Llama3Scaling,
    NtkScaling,
    RotaryConfig,
    YarnScaling,
)
from windowlm.attention.rotary import rotary_magnitude
from windowlm.attention.window_conventions import to_transformers
from windowlm.errors import UserError
from windowlm.model.config import ModelConfig
from windowlm.setting_text import setting_text

CLASSES = {
    "mistral": "MistralForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}
# Parts that none of the architectures has, and the value that leaves them out.
_ABSENT_THERE: dict[str, Any] = {
    "activation": "swiglu",
    "learned_sinks": False,
    "output_gate": False,
    "logit_cap": None,
    "ngram_embeddings": None,
    "value_embeddings": 0,
    "embedding_residual": False,
    "short_convolution": None,
    "final_logit_cap": None,
}


def transformers_config(
    config: ModelConfig,
    *,
    vocabulary_size: int,
    sequence_length: int,
    end_of_document: int,
    further_ends: Collection[int] = (),
) -> dict[str, Any]:
    """Content of the config.json; it reads the same in every version of transformers from 4.57 on.

    Args:
        config: shape of the model.
        vocabulary_size: rows of the embedding.
        sequence_length: tokens of a training sequence.
        end_of_document: id of the end mark.
        further_ends: ids that end a text as well.

    Raises:
        UserError: no architecture can say it, with the setting and the reason.
    """
    _refuse_absent(config)
    windows, rotary = _windows(config), _rotary(config)
    model_type = _model_type(config)
    others = sorted(set(further_ends) - {end_of_document})
    sliding = next((window for window in windows if window is not None), None)
    content: dict[str, Any] = {
        "architectures": [CLASSES[model_type]],
        "model_type": model_type,
        "vocab_size": vocabulary_size,
        "hidden_size": config.dim,
        "intermediate_size": config.feed_forward_dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied_embeddings,
        "attention_dropout": config.attention_dropout,
        "sliding_window": to_transformers(sliding),
        "max_position_embeddings": _positions(sequence_length, rotary),
        **_rope(rotary, config.head_dim),
        "bos_token_id": None,
        "eos_token_id": [end_of_document, *others] if others else end_of_document,
        "pad_token_id": None,
        # Versions before 5 read the second name.
        "dtype": "float32",
        "torch_dtype": "float32",
    }
    if model_type != "mistral":
        content["use_sliding_window"] = sliding is not None
        content["layer_types"] = [
            "full_attention" if window is None else "sliding_attention" for window in windows
        ]
    if model_type != "mistral":
        content["attention_bias"] = config.qkv_bias
    if model_type == "smollm3":
        content["no_rope_layers"] = [int(layer is not None) for layer in config.layer_rotaries()]
        content["mlp_bias"] = False
    return content


def _model_type(config: ModelConfig) -> str:
    has_nope = None in config.layer_rotaries()
    if config.qkv_bias and config.qk_norm:
        raise UserError(
            "model.qkv_bias=true beside norms of queries and keys: SmolLM3, the architecture with these "
            "biases, has none, so transformers cannot express the model"
        )
    if config.qk_norm:
        if has_nope:
            raise UserError(
                "model.qk_norm=true beside layers without rotary positions: Qwen3, the architecture with "
                "norms of queries and keys, rotates in every layer, so transformers cannot express the model"
            )
        return "qwen3"
    differ = len(set(config.layer_windows())) > 1
    return "smollm3" if has_nope or differ or config.qkv_bias else "mistral"


def _refuse_absent(config: ModelConfig) -> None:
    for name, without in _ABSENT_THERE.items():
        value = getattr(config, name)
        if value != without:
            text = setting_text(asdict(value) if name == "ngram_embeddings" else value)
            raise UserError(
                f"model.{name}={text}: Mistral, Qwen3 and SmolLM3 have no such part, so transformers "
                f"cannot express the model; a model trained with model.{name}={setting_text(without)} can be"
            )
    if any(config.layer_sinks()):
        raise UserError(
            f"model.attention_sinks={config.attention_sinks}: a window of transformers hides the first "
            "tokens too, so it cannot express the model; a model trained with model.attention_sinks=0 can be"
        )


def _windows(config: ModelConfig) -> list[int | None]:
    windows = config.layer_windows()
    widths = sorted({window for window in windows if window is not None})
    if len(widths) > 1:
        raise UserError(
            f"model.window={setting_text(config.window)}: layers have windows of {setting_text(widths)} "
            "keys, and a model of transformers has one sliding_window, for all layers that are not full"
        )
    if widths == [1]:
        raise UserError(
            "model.window=1: transformers keeps sliding_window - 1 keys while it generates, and of none it "
            "keeps all, so that generated text would be another"
        )
    return windows


def _rotary(config: ModelConfig) -> RotaryConfig | None:
    """The one rotation of all layers that rotate."""
    kinds = list(dict.fromkeys(layer for layer in config.layer_rotaries() if layer is not None))
    if len(kinds) > 1:
        text = json.dumps([asdict(kind) for kind in kinds])
        raise UserError(
            f"model.rotary: layers rotate in different ways, {text}, and Mistral, Qwen3 and SmolLM3 "
            "have one rotation for all layers"
        )
    if kinds and kinds[0].fraction != 1:
        raise UserError(
            f"model.rotary.fraction={kinds[0].fraction}: Mistral, Qwen3 and SmolLM3 rotate whole "
            "heads, so transformers cannot express the model"
        )
    return kinds[0] if kinds else None


def _positions(sequence_length: int, rotary: RotaryConfig | None) -> int:
    if rotary is not None and isinstance(rotary.scaling, YarnScaling | Llama3Scaling):
        return max(sequence_length, int(rotary.scaling.original_length * rotary.scaling.factor))
    return sequence_length


def _rope(rotary: RotaryConfig | None, head_dim: int) -> dict[str, Any]:
    """The rotation under the names of versions from 5 on, and of those before."""
    rotary = rotary or RotaryConfig()
    base, scaling = rotary.base, rotary.scaling
    parameters: dict[str, Any] = {"rope_type": "default"}
    if isinstance(scaling, NtkScaling):
        base *= scaling.factor ** (head_dim / max(head_dim - 2, 1))
    elif isinstance(scaling, LinearScaling):
        parameters = {"rope_type": "linear", "factor": scaling.factor}
    elif isinstance(scaling, YarnScaling):
        parameters = {
            "rope_type": "yarn",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_length,
            "beta_fast": scaling.fast,
            "beta_slow": scaling.slow,
        }
        if scaling.attention_factor is not None or scaling.mscale is not None:
            parameters["attention_factor"] = rotary_magnitude(rotary)
        if not scaling.truncate:
            parameters["truncate"] = False
    elif isinstance(scaling, Llama3Scaling):
        parameters = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_length,
            "low_freq_factor": scaling.slow,
            "high_freq_factor": scaling.fast,
        }
    return {
        "rope_parameters": {"rope_theta": base, **parameters},
        "rope_theta": base,
        "rope_scaling": None if parameters["rope_type"] == "default" else parameters,
    }
