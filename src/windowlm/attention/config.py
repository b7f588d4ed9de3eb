"""Settings of the attention layer, free of torch so that checking them costs milliseconds."""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

BackendName = Literal["auto", "reference", "banded", "flex", "varlen", "flash4", "band"]
BACKENDS: tuple[str, ...] = get_args(BackendName)


def _check(scaling: object, **minima: float) -> None:
    for name, minimum in minima.items():
        value = getattr(scaling, name)
        if not value >= minimum:
            raise ValueError(
                f"{name}={value!r}: a number from {minimum:g} on is allowed; try {name}={minimum:g}"
            )


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Positions divided by `factor` (Chen et al. 2023, https://arxiv.org/abs/2306.15595)."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    kind: Literal["linear"]
    factor: float

    def __post_init__(self) -> None:
        """Check the ranges."""
        _check(self, factor=1)


@dataclass(frozen=True, kw_only=True)
class NtkScaling:
    """Base times `factor^(R / (R - 2))`: the slowest pair slows by `factor`, the fastest stays.

    NTK-aware scaling, bloc97 2023; appendix A.1 of https://arxiv.org/abs/2309.00071.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    kind: Literal["ntk"]
    factor: float

    def __post_init__(self) -> None:
        """Check the ranges."""
        _check(self, factor=1)


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """Slow pairs divided by `factor`, fast ones left, a ramp between (Peng et al. 2023, arXiv 2309.00071).

    Attributes:
        factor: how many times longer than `original_length` the context may be.
        original_length: context length of the training before scaling, in tokens.
        fast, slow: turns over `original_length` above which a pair is left, below which it is divided.
        attention_factor: factor on cosines and sines; None for `0.1 ln(factor) + 1`.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    kind: Literal["yarn"]
    factor: float
    original_length: int
    fast: float = 32.0
    slow: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        _check(self, factor=1, original_length=1)
        if not 0 < self.slow < self.fast:
            raise ValueError(
                f"slow={self.slow!r}: a number between 0 and fast={self.fast!r} is allowed; try slow=1"
            )


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Slow pairs divided by `factor`, fast ones left, by turns over the original length (Llama 3.1).

    Attributes:
        factor: divisor of the slow pairs' frequencies.
        original_length: context length of the training before scaling, in tokens.
        fast, slow: turns over `original_length` above which a pair is left, below which it is divided.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    kind: Literal["llama3"]
    factor: float = 8.0
    original_length: int = 8192
    fast: float = 4.0
    slow: float = 1.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        _check(self, factor=1, original_length=1)
        if not 0 < self.slow < self.fast:
            raise ValueError(
                f"slow={self.slow!r}: a number between 0 and fast={self.fast!r} is allowed; try slow=1"
            )


RotaryScaling = LinearScaling | NtkScaling | YarnScaling | Llama3Scaling


@dataclass(frozen=True, kw_only=True)
class RotaryConfig:
    """Rotary position embedding of one layer (Su et al. 2021, https://arxiv.org/abs/2104.09864).

    Attributes:
        base: wavelengths grow from 2 pi to 2 pi * base tokens over the rotated dimensions.
        fraction: share of each head's dimensions that is rotated; the rest carries no position.
        scaling: how the frequencies are slowed for contexts longer than trained on; None: not at all.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    base: float = 10_000.0
    fraction: float = 1.0
    scaling: RotaryScaling | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not self.base > 1:
            raise ValueError(f"base={self.base!r}: a number above 1 is allowed; try base=10000")
        if not 0 < self.fraction <= 1:
            raise ValueError(
                f"fraction={self.fraction!r}: a number above 0 and at most 1 is allowed; try fraction=1"
            )
