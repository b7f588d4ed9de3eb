"""Settings of the decoder."""

import json
from dataclasses import asdict, dataclass, field, replace
from typing import ClassVar, Literal, TypeVar

from windowlm.attention.config import BackendName, RotaryConfig, nearest_fraction, rotated_dimensions
from windowlm.setting_text import setting_text

Entry = TypeVar("Entry")
LONGEST_NGRAM = 16
LARGEST_WINDOW = 2**31 - 1  # positions are 32-bit on some backends
LEAST_CAP, LARGEST_CAP = 1.2e-38, 3.4e38  # float32 has no more and, but for a few digits, no less
Activation = Literal["swiglu", "relu_squared"]

# Beyond these a slip of the finger would be counted through, layer by layer and head by head.
MOST_LAYERS, LARGEST_SIZE = 10_000, 2**24


@dataclass(frozen=True, kw_only=True)
class NgramEmbeddingsConfig:
    """Hashed embeddings of the n-grams that end at a token (BLT, Pagnoni et al. 2024, arXiv:2412.09871).

    Args:
        orders: lengths n of the n-grams, in tokens, the own one included; each has a table.
        buckets: rows of each table; n-grams share rows by a hash, unless there is one for each.
        dim: width of the tables, projected to that of the model; null for the model's own.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    orders: list[int] = field(default_factory=lambda: [2, 3, 4])
    buckets: int = 8192
    dim: int | None = None

    def __post_init__(self) -> None:
        in_range = all(2 <= order <= LONGEST_NGRAM for order in self.orders)
        if not self.orders or not in_range or len(set(self.orders)) < len(self.orders):
            raise ValueError(
                f"orders={self.orders}: different whole numbers from 2 to {LONGEST_NGRAM}, at least one; "
                "try orders=[2,3,4]"
            )
        if not 1 <= self.buckets < 2**31:
            raise ValueError(f"buckets={self.buckets}: must lie in [1, 2**31); try buckets=8192")
        if self.dim is not None and self.dim < 1:
            raise ValueError(
                f"dim={self.dim}: must be at least 1, or null for the model's width; try dim=null"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a decoder; the vocabulary size comes from the tokenizer.

    Args:
        layers: number of blocks.
        dim: width of the residual stream.
        heads: query heads.
        kv_heads: key-value heads; divides ``heads``. 1 is MQA, ``heads`` is MHA.
        head_dim: width of one head.
        feed_forward_dim: hidden width of the MLP.
        activation: of the MLP; ``swiglu`` has a gate, so three matrices (Shazeer 2020, arXiv:2002.05202),
            ``relu_squared`` has two (Primer, So et al. 2021, arXiv:2109.08668).
        window: keys that a query may see, itself included; null is full causal attention; a list is a
            pattern that repeats over the layers, such as ``[1024, 1024, 1024, null]``.
        attention_sinks: first tokens of a document that stay visible beside the window (Xiao et al. 2023,
            arXiv:2309.17453).
        learned_sinks: a learned logit for each head in the softmax's denominator (gpt-oss, arXiv:2508.10925).
        output_gate: multiply each head's output by a sigmoid of the hidden state (Qiu et al. 2025,
            arXiv:2505.06708).
        logit_cap: bound attention scores by ``cap * tanh(score / cap)`` (Gemma 2, arXiv:2408.00118); null
            for no bound.
        qk_norm: RMSNorm over each query and key head before the rotation (Henry et al. 2020).
        qk_norm_epsilon: added to the mean square in these norms; null for the machine epsilon of the dtype.
        qkv_bias: a bias on queries, keys and values (as in Qwen2, arXiv:2407.10671).
        tied_embeddings: share the embedding matrix with the output head.
        attention_dropout: dropout on attention weights while training.
        norm_epsilon: added to the mean square in every RMSNorm.
        backend: attention backend, or ``auto``.
        rotary: rotary positions of every layer; null for none (NoPE); a list is a pattern that repeats over
            the layers, such as ``[{base: 10000}, null]``.
        ngram_embeddings: embeddings of the last few tokens, added to the token's own; null for none.
        value_embeddings: tables with an embedding of each token that joins its values (value residual, Zhou
            et al. 2024, arXiv:2410.17897, with learned tables as in modded-nanogpt); n tables serve the first
            n layers and, in the same order, the last n; 0 for none.
        embedding_residual: each layer reads ``a * x + b * x0`` instead of the residual stream x, with x0 what
            the first layer reads, normalised, and scalars a and b learned for each layer (as in
            modded-nanogpt).
        final_logit_cap: bound the logits of the next token by ``cap * tanh(logit / cap)`` (Gemma 2,
            arXiv:2408.00118); null for no bound.
        short_convolution: tokens, the own one included, that a causal convolution of each channel of queries,
            keys and values reads (Primer, So et al. 2021, arXiv:2109.08668); null for none.
        zero_output_init: matrices that write into the residual stream start at zero, so that every layer
            starts as the identity (Goyal et al. 2017, arXiv:1706.02677, section 5.1; as in modded-nanogpt).
        init_from: folder or hub name of a model that training starts from, of ours or in transformers'
            layout; shape and tokenizer are then its own, and the settings without weights may be changed.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    layers: int = 4
    dim: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    feed_forward_dim: int = 352
    activation: Activation = "swiglu"
    window: int | list[int | None] | None = 256
    attention_sinks: int = 0
    learned_sinks: bool = False
    output_gate: bool = False
    logit_cap: float | None = None
    qk_norm: bool = True
    qk_norm_epsilon: float | None = None
    qkv_bias: bool = False
    tied_embeddings: bool = True
    attention_dropout: float = 0.0
    norm_epsilon: float = 1e-6
    backend: BackendName = "auto"
    rotary: RotaryConfig | list[RotaryConfig | None] | None = field(default_factory=RotaryConfig)
    ngram_embeddings: NgramEmbeddingsConfig | None = None
    value_embeddings: int = 0
    embedding_residual: bool = False
    short_convolution: int | None = None
    final_logit_cap: float | None = None
    zero_output_init: bool = False
    init_from: str | None = None

    def __post_init__(self) -> None:
        for name in ("layers", "dim", "heads", "kv_heads", "head_dim", "feed_forward_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1; try {name}=1")
            most = MOST_LAYERS if name == "layers" else LARGEST_SIZE
            if getattr(self, name) > most:
                raise ValueError(f"{name}={getattr(self, name)}: must be at most {most}; try {name}={most}")
        if self.heads % self.kv_heads:
            divisors = [n for n in range(1, self.heads + 1) if self.heads % n == 0]
            nearest = min(divisors, key=lambda n: abs(n - self.kv_heads))
            raise ValueError(
                f"kv_heads={self.kv_heads}: must divide heads={self.heads}, so one of "
                f"{', '.join(map(str, divisors))}; try kv_heads={nearest}"
            )
        for name in ("window", "rotary"):
            pattern = getattr(self, name)
            if isinstance(pattern, list) and len(pattern) > self.layers:
                given = asdict(self)[name]
                raise ValueError(
                    f"{name}={setting_text(given)}: a pattern of {len(pattern)} entries, and "
                    f"layers={self.layers}, so that its end would be in no layer; try "
                    f"{name}={setting_text(given[: self.layers])}"
                )
        self._check_rotary()
        if isinstance(self.window, list) and not self.window:
            raise ValueError("window=[]: a pattern holds at least one entry; try window=256")
        for window in _pattern(self.window):
            if window is not None and window > LARGEST_WINDOW:
                raise ValueError(
                    f"window={self.window}: no text is that long; allowed is at most {LARGEST_WINDOW}, or "
                    "null for full causal attention; try window=null"
                )
            if window is not None and window < 1:
                raise ValueError(
                    f"window={self.window}: a window counts the keys a query sees, itself included, so it is "
                    "at least 1, or null for full causal attention; try window=256"
                )
        if self.attention_sinks < 0:
            raise ValueError(
                f"attention_sinks={self.attention_sinks}: must be at least 0; try attention_sinks=0"
            )
        for name, usual in (("logit_cap", 50), ("final_logit_cap", 30)):
            cap = getattr(self, name)
            if cap is not None and not LEAST_CAP <= cap <= LARGEST_CAP:
                raise ValueError(
                    f"{name}={cap}: must be from {LEAST_CAP:g} to {LARGEST_CAP:g}, as scores are float32, or "
                    f"null for no bound; try {name}={usual}"
                )
        if not 0 <= self.value_embeddings <= self.layers // 2:
            raise ValueError(
                f"value_embeddings={self.value_embeddings}: each table serves two of layers={self.layers}, "
                f"so 0 to {self.layers // 2}; try value_embeddings={self.layers // 2}"
            )
        if self.short_convolution is not None and self.short_convolution < 2:
            raise ValueError(
                f"short_convolution={self.short_convolution}: counts the tokens read, the own one included, "
                "so at least 2, or null for none; try short_convolution=4"
            )
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(
                f"attention_dropout={self.attention_dropout}: must lie in [0, 1); try attention_dropout=0.1"
            )
        if not self.norm_epsilon > 0:
            raise ValueError(f"norm_epsilon={self.norm_epsilon}: must be above 0; try norm_epsilon=1e-6")
        if self.qk_norm_epsilon is not None and not self.qk_norm_epsilon > 0:
            raise ValueError(
                f"qk_norm_epsilon={self.qk_norm_epsilon}: must be above 0, or null for the machine epsilon "
                "of the dtype; try qk_norm_epsilon=null"
            )
        if self.init_from is not None and not self.init_from.strip():
            raise ValueError(
                f"init_from={self.init_from}: the folder or hub name of a model, or null; try init_from=null"
            )

    def layer_windows(self) -> list[int | None]:
        """Window of each layer, the pattern repeated from the first layer on."""
        return self._by_layer(self.window)

    def layer_sinks(self) -> list[int]:
        """Sinks of each layer: none without a window, which hides nothing and leaves faster backends."""
        return [0 if window is None else self.attention_sinks for window in self.layer_windows()]

    def layer_rotaries(self) -> list[RotaryConfig | None]:
        """Rotary positions of each layer, the pattern repeated from the first layer on."""
        return self._by_layer(self.rotary)

    def layer_value_tables(self) -> list[int | None]:
        """Number of the table of value embeddings that each layer uses, None for none."""
        tables = range(self.value_embeddings)
        return [*tables, *[None] * (self.layers - 2 * len(tables)), *tables]

    def _by_layer(self, setting: Entry | list[Entry]) -> list[Entry]:
        pattern = _pattern(setting)
        return [pattern[layer % len(pattern)] for layer in range(self.layers)]

    def _check_rotary(self) -> None:
        pattern = _pattern(self.rotary)
        if not pattern:
            raise ValueError("rotary=[]: a pattern holds at least one entry; try rotary=[{base: 10000},null]")
        if self.head_dim % 2 and any(rotary is not None for rotary in pattern):
            raise ValueError(
                f"head_dim={self.head_dim}: must be even for rotary positions; "
                f"try head_dim={self.head_dim + 1}"
            )
        for place, rotary in enumerate(pattern):
            if rotary is None or rotated_dimensions(self.head_dim, rotary.fraction) is not None:
                continue
            good = nearest_fraction(self.head_dim, rotary.fraction)
            key, advice = "rotary.fraction", f"rotary.fraction={good!r}"
            if isinstance(self.rotary, list):
                mended = [*pattern[:place], replace(rotary, fraction=good), *pattern[place + 1 :]]
                entries = json.dumps([entry and asdict(entry) for entry in mended])
                key, advice = f"rotary[{place}].fraction", f"rotary={entries}".replace('"', "")
            raise ValueError(
                f"{key}={rotary.fraction!r}: must rotate an even number of the head_dim={self.head_dim} "
                f"dimensions; try {advice}"
            )


def _pattern(setting: Entry | list[Entry]) -> list[Entry]:
    return setting if isinstance(setting, list) else [setting]
