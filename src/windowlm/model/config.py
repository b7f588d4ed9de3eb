"""Settings of the decoder."""

from dataclasses import dataclass, field
from typing import ClassVar

from windowlm.attention.config import BackendName, RotaryConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a decoder; the vocabulary size comes from the tokenizer.

    Args:
        layers: number of blocks.
        dim: width of the residual stream.
        heads: query heads.
        kv_heads: key-value heads; divides ``heads``. 1 is MQA, ``heads`` is MHA.
        head_dim: width of one head.
        feed_forward_dim: hidden width of the gated MLP.
        window: keys that a query may see, itself included; null is full causal attention; a list is a
            pattern that repeats over the layers, such as ``[1024, 1024, 1024, null]``.
        qk_norm: RMSNorm over each query and key head before the rotation (Henry et al. 2020).
        tied_embeddings: share the embedding matrix with the output head.
        attention_dropout: dropout on attention weights while training.
        norm_epsilon: added to the mean square in every RMSNorm.
        backend: attention backend, or ``auto``.
        rotary: rotary positions of every layer; null for none (NoPE).
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    layers: int = 4
    dim: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    feed_forward_dim: int = 352
    window: int | list[int | None] | None = 256
    qk_norm: bool = True
    tied_embeddings: bool = True
    attention_dropout: float = 0.0
    norm_epsilon: float = 1e-6
    backend: BackendName = "auto"
    rotary: RotaryConfig | None = field(default_factory=RotaryConfig)

    def __post_init__(self) -> None:
        for name in ("layers", "dim", "heads", "kv_heads", "head_dim", "feed_forward_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1; try {name}=1")
        if self.heads % self.kv_heads:
            divisors = [n for n in range(1, self.heads + 1) if self.heads % n == 0]
            nearest = min(divisors, key=lambda n: abs(n - self.kv_heads))
            raise ValueError(
                f"kv_heads={self.kv_heads}: must divide heads={self.heads}, so one of "
                f"{', '.join(map(str, divisors))}; try kv_heads={nearest}"
            )
        if self.rotary is not None and self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim}: must be even for rotary positions; "
                f"try head_dim={self.head_dim + 1}"
            )
        if self.rotary is not None and self.rotary.fraction * self.head_dim % 2:
            fraction = self.rotary.fraction
            shares = [rotated / self.head_dim for rotated in range(2, self.head_dim + 1, 2)]
            exact = [share for share in shares if share * self.head_dim % 2 == 0]
            raise ValueError(
                f"rotary.fraction={fraction!r}: must rotate an even number of the head_dim={self.head_dim} "
                f"dimensions; try rotary.fraction={min(exact, key=lambda share: abs(share - fraction))!r}"
            )
        if isinstance(self.window, list) and not self.window:
            raise ValueError("window=[]: a pattern holds at least one entry; try window=256")
        for window in self.window if isinstance(self.window, list) else [self.window]:
            if window is not None and window < 1:
                raise ValueError(
                    f"window={self.window}: a window counts the keys a query sees, itself included, so it is "
                    "at least 1, or null for full causal attention; try window=256"
                )
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(
                f"attention_dropout={self.attention_dropout}: must lie in [0, 1); try attention_dropout=0.1"
            )
        if not self.norm_epsilon > 0:
            raise ValueError(f"norm_epsilon={self.norm_epsilon}: must be above 0; try norm_epsilon=1e-6")

    def layer_windows(self) -> list[int | None]:
        """Window of each layer, the pattern repeated from the first layer on."""
        pattern = self.window if isinstance(self.window, list) else [self.window]
        return [pattern[layer % len(pattern)] for layer in range(self.layers)]
