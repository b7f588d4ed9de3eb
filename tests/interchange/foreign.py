"""Small random models that transformers makes and saves, for the tests that read them."""

from pathlib import Path
from typing import Any

import torch

from tests.interchange.models import trained_bpe
from windowlm.tokenization.transformers_files import write_transformers_files

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "pad_token_id": None,
    "eos_token_id": 299,
}
SLIDING = {"use_sliding_window": True, "sliding_window": 8}
# Under the names that all versions of transformers read.
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 16,
}
MSCALES = {"mscale": 1.4, "mscale_all_dim": 0.3}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
# Name: architecture, what differs from the sizes, and the windows that it shows.
FOREIGN: dict[str, tuple[str, dict[str, Any], Any]] = {
    "llama": ("Llama", {}, None),
    "llama, tied, own head size": ("Llama", {"tie_word_embeddings": True, "head_dim": 16}, None),
    "llama 3.1": ("Llama", {"rope_theta": 5000.0, "rope_scaling": LLAMA3}, None),
    "llama, linear": (
        "Llama",
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        None,
    ),
    "mistral": ("Mistral", {"sliding_window": 8}, 8),
    "mistral without a window": ("Mistral", {"sliding_window": None, "head_dim": 16}, None),
    "qwen2": ("Qwen2", {}, None),
    "qwen2 with windows": ("Qwen2", {**SLIDING, "max_window_layers": 1}, [None, 8, 8, 8]),
    "qwen3": ("Qwen3", {"head_dim": 16, "rms_norm_eps": 1e-3}, None),
    "qwen3, yarn": ("Qwen3", {"head_dim": 16, "rope_theta": 500.0, "rope_scaling": YARN}, None),
    "qwen3, yarn with all its parts": (
        "Qwen3",
        {"head_dim": 16, "rope_theta": 500.0, "rope_scaling": {**YARN, "truncate": False, **MSCALES}},
        None,
    ),
    "qwen3 with windows": (
        "Qwen3",
        {"head_dim": 8, **SLIDING, "layer_types": ["sliding_attention", "full_attention"] * 2},
        [8, None],
    ),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2}, None),
    "smollm3 with windows": ("SmolLM3", {"no_rope_layers": [1, 1, 0, 1], **SLIDING}, [None, None, 8]),
}


def foreign_model(name: str, vocabulary_size: int = 300, **changes: Any) -> Any:
    """The model of an entry, its weights so large that every key matters."""
    import transformers

    architecture, own, _ = FOREIGN[name]
    config = getattr(transformers, f"{architecture}Config")(
        **{**SIZES, "vocab_size": vocabulary_size, **own, **changes}
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).eval()
    for key, parameter in model.named_parameters():
        if "norm" in key:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif parameter.dim() == 1:
            torch.nn.init.normal_(parameter, std=0.5)
        else:
            torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5)
    return model


def save_foreign(folder: Path, name: str, **changes: Any) -> Any:
    """Save the model of an entry with a byte-level BPE of 300 tokens."""
    model = foreign_model(name, **changes)
    model.save_pretrained(folder)
    write_transformers_files(trained_bpe(), folder)
    return model
