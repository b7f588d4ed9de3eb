"""What a model costs: parameters, FLOPs, KV-cache bytes, receptive field.

Model FLOPs a token = 6 x matmul parameters (head included, embedding look-up not) + 3 x forward
attention; forward attention = 4 x head_dim x heads x visible pairs a token (PaLM, Chowdhery et al. 2022,
appendix B, with pairs counted inside the window only).
"""

from dataclasses import dataclass
from itertools import pairwise

from windowlm.attention.window import narrowed, receptive_field, visible_pairs
from windowlm.model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """Cost of one model at one sequence length.

    Attributes:
        parameters: all parameters, a tied matrix counted once.
        matmul_parameters: parameters in matrix products (head included, embedding look-up not).
        attention_flops_per_token: forward attention FLOPs a token, mean over the sequence.
        flops_per_token: model FLOPs a token, forward and backward.
        kv_cache_bytes_per_token: bytes of keys and values that one token adds to the cache of all layers.
        kv_cache_bytes: bytes of the cache at the sequence length; windowed layers hold at most W tokens and
            the sinks. The few last projections that a short convolution reads are left out.
        receptive_field: tokens that can influence an output; None when a layer sees everything.
    """

    parameters: int
    matmul_parameters: int
    attention_flops_per_token: float
    flops_per_token: float
    kv_cache_bytes_per_token: int
    kv_cache_bytes: int
    receptive_field: int | None


def model_cost(
    config: ModelConfig, vocabulary_size: int, sequence_length: int, bytes_per_element: int
) -> ModelCost:
    """Cost of ``config`` on unpacked sequences of ``sequence_length`` tokens.

    Args:
        config: shape of the model.
        vocabulary_size: rows of the embedding and the head.
        sequence_length: tokens in a sequence.
        bytes_per_element: bytes of one cached number, 4 for float32, 2 for bfloat16.
    """
    seen = _most_keys(config)
    reach = _reach(config)
    attention_width = config.heads * config.head_dim
    kv_width = config.kv_heads * config.head_dim
    feed_forward_matrices = 3 if config.activation == "swiglu" else 2
    block = config.dim * (2 * attention_width + 2 * kv_width)
    block += feed_forward_matrices * config.dim * config.feed_forward_dim
    if config.output_gate:
        block += config.dim * config.heads
    vectors = 2 * config.dim + (2 * config.head_dim if config.qk_norm else 0)
    if config.qkv_bias:
        vectors += attention_width + 2 * kv_width
    if config.learned_sinks:
        vectors += config.heads
    if config.short_convolution is not None:
        vectors += config.short_convolution * (attention_width + 2 * kv_width)
    embedding = vocabulary_size * config.dim
    matmul_parameters = config.layers * block + embedding
    parameters = matmul_parameters + config.layers * vectors + config.dim
    if not config.tied_embeddings:
        parameters += embedding
    if (ngrams := config.ngram_embeddings) is not None:
        projection = ngrams.dim * config.dim if ngrams.dim else 0
        matmul_parameters += projection
        parameters += projection + len(ngrams.orders) * ngrams.buckets * (ngrams.dim or config.dim)
    # Each table, and two shares in each of its two layers.
    parameters += config.value_embeddings * (vocabulary_size * kv_width + 4)
    if config.embedding_residual:
        parameters += 2 * config.layers
    pairs_per_token = sum(visible_pairs(sequence_length, keys) for keys in seen) / sequence_length
    attention_flops = 4 * attention_width * pairs_per_token
    kv_bytes = 2 * kv_width * bytes_per_element
    return ModelCost(
        parameters=parameters,
        matmul_parameters=matmul_parameters,
        attention_flops_per_token=attention_flops,
        flops_per_token=6 * matmul_parameters + 3 * attention_flops,
        kv_cache_bytes_per_token=kv_bytes * config.layers,
        kv_cache_bytes=sum(
            kv_bytes * (sequence_length if keys is None else min(keys, sequence_length)) for keys in seen
        ),
        receptive_field=reach,
    )


def pairs_by_position(config: ModelConfig, length: int, window_limit: int | None = None) -> list[int]:
    """Query-key pairs of all layers that the token at each position of a document adds, ``[length]``.

    Args:
        config: shape of the model.
        length: positions to tabulate.
        window_limit: no window shows more keys; None for no limit.
    """
    seen = _most_keys(config, window_limit)
    up_to = [sum(visible_pairs(tokens, keys) for keys in seen) for tokens in range(length + 1)]
    return [after - before for before, after in pairwise(up_to)]


def _reach(config: ModelConfig) -> int | None:
    """Tokens that can influence an output: through windows, what is read behind their far ends, and sinks."""
    seen = receptive_field(config.layer_windows())
    ngrams = config.ngram_embeddings
    further = 0 if ngrams is None else max(ngrams.orders) - 1
    if config.short_convolution is not None:
        further += config.layers * (config.short_convolution - 1)
    return None if seen is None else seen + further + config.attention_sinks


def _most_keys(config: ModelConfig, window_limit: int | None = None) -> list[int | None]:
    """Keys that a query of each layer sees at most, the sinks included; None for all.

    A query with n tokens before and at it sees ``min(n, W)`` in its window, and of the others the first S
    are sinks: ``min(n, W + S)`` together, as many as a window of W + S shows.
    """
    windows = [narrowed(window, window_limit) for window in config.layer_windows()]
    layers = zip(windows, config.layer_sinks(), strict=True)
    return [None if window is None else window + sinks for window, sinks in layers]
