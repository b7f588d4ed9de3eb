"""Names of the decoder's weights here and in transformers' Llama, Mistral, Qwen2, Qwen3 and SmolLM3."""

import re

_OUTSIDE = {
    "embedding.weight": "model.embed_tokens.weight",
    "final_norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_IN_BLOCK = {
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")


def transformers_name(name: str) -> str:
    """Name there of a weight of ``Decoder.state_dict()``, such as ``blocks.0.attention.query.weight``.

    Raises:
        KeyError: it has no place in those layouts.
    """
    if (of_block := _BLOCK.fullmatch(name)) is None:
        return _OUTSIDE[name]
    layer, module, kind = of_block.groups()
    return f"model.layers.{layer}.{_IN_BLOCK[module]}.{kind}"


def output_bias_name(layer: int) -> str:
    """Name there of a bias that our layers lack."""
    return f"model.layers.{layer}.{_IN_BLOCK['attention.output']}.bias"
