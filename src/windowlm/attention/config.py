"""Settings of the attention layer, free of torch so that checking them costs milliseconds."""

import sys
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

BackendName = Literal["auto", "reference", "banded", "flex", "varlen", "flash4", "band"]
BACKENDS: tuple[str, ...] = get_args(BackendName)


def rotated_dimensions(dim: int, fraction: float) -> int | None:
    """Dimensions of a head that the fraction rotates; None where that is no even number from 2 on.

    0.28 of 50 is 14 but for the rounding of the product, so an error of that size is no other number.
    """
    rotated = round(fraction * dim)
    fits = rotated >= 2 and rotated % 2 == 0 and abs(fraction * dim - rotated) <= 1e-9 * dim
    return rotated if fits else None


def nearest_fraction(dim: int, fraction: float) -> float:
    """Of the shares of a head of 2 dimensions or more that are an even number of them, the nearest."""
    return min((rotated / dim for rotated in range(2, dim + 1, 2)), key=lambda share: abs(share - fraction))


def is_number(value: object) -> bool:
    """Whether it is a finite number; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def shown(value: object) -> str:
    """Its text, cut where it would fill a page: Python even refuses to write very long integers."""
    return "a whole number of many digits" if isinstance(value, int) and abs(value) > 1e60 else repr(value)


def _check(fits: bool, settings: object, name: str, allowed: str, good: object) -> None:
    if not fits:
        raise ValueError(f"{name}={getattr(settings, name)!r}: {allowed} is allowed; try {name}={good}")


def _check_kind_and_factor(scaling: "RotaryScaling", kind: str) -> None:
    _check(scaling.kind == kind, scaling, "kind", f"{kind!r} in a {type(scaling).__name__}", kind)
    factor = scaling.factor
    _check(is_number(factor) and factor >= 1, scaling, "factor", "a finite number from 1 on", 1)


def _check_ramp(scaling: "YarnScaling | Llama3Scaling") -> None:
    length, fast, slow = scaling.original_length, scaling.fast, scaling.slow
    whole = isinstance(length, int) and is_number(length) and length >= 1
    _check(whole, scaling, "original_length", "a whole number from 1 on", 1)
    _check(is_number(fast) and fast > 0, scaling, "fast", "a finite number above 0", 32)
    between = is_number(slow) and 0 < slow < fast
    _check(between, scaling, "slow", f"a number between 0 and fast={fast!r}", 1 if fast > 1 else fast / 2)


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Positions divided by `factor` (Chen et al. 2023, https://arxiv.org/abs/2306.15595)."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    kind: Literal["linear"]
    factor: float

    def __post_init__(self) -> None:
        """Check the ranges."""
        _check_kind_and_factor(self, "linear")


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
        _check_kind_and_factor(self, "ntk")


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """Slow pairs divided by `factor`, fast ones left, a ramp between (Peng et al. 2023, arXiv 2309.00071).

    Attributes:
        factor: how many times longer than `original_length` the context may be.
        original_length: context length of the training before scaling, in tokens.
        fast, slow: turns over `original_length` above which a pair is left, below which it is divided.
        truncate: round the ends of the ramp to whole pairs, outwards; gpt-oss does not.
        attention_factor: factor on cosines and sines; None for `0.1 ln(factor) + 1`.
        mscale, mscale_all_dim: the attention factor is `(0.1 mscale ln(factor) + 1)` over the same of
            `mscale_all_dim` (DeepSeek-V2, arXiv:2405.04434); None for neither.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    kind: Literal["yarn"]
    factor: float
    original_length: int
    fast: float = 32.0
    slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        _check_kind_and_factor(self, "yarn")
        _check_ramp(self)
        _check(isinstance(self.truncate, bool), self, "truncate", "true or false", "true")
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            value = getattr(self, name)
            fits = value is None or (is_number(value) and value > 0)
            _check(fits, self, name, "a finite number above 0, or null,", "null")
        for name, other in (("mscale", "mscale_all_dim"), ("mscale_all_dim", "mscale")):
            if getattr(self, name) is not None and getattr(self, other) is None:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: it needs {other} beside it; try {name}=null"
                )
        if self.attention_factor is not None and self.mscale is not None:
            raise ValueError(
                f"attention_factor={self.attention_factor!r}: mscale={self.mscale!r} and mscale_all_dim say "
                "it already; try attention_factor=null"
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
        _check_kind_and_factor(self, "llama3")
        _check_ramp(self)


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
        base, fraction, scaling = self.base, self.fraction, self.scaling
        _check(is_number(base) and base > 1, self, "base", "a finite number above 1", 10000)
        share = is_number(fraction) and 0 < fraction <= 1
        _check(share, self, "fraction", "a number above 0 and at most 1", 1)
        kinds = "a LinearScaling, NtkScaling, YarnScaling, Llama3Scaling or None"
        known = scaling is None or isinstance(scaling, RotaryScaling)
        _check(known, self, "scaling", kinds, "LinearScaling(kind='linear', factor=4)")
