"""Settings of the attention layer, free of torch so that checking them costs milliseconds."""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

BackendName = Literal["auto", "reference", "banded"]
BACKENDS: tuple[str, ...] = get_args(BackendName)


@dataclass(frozen=True, kw_only=True)
class RotaryConfig:
    """Rotary position embedding of one layer (Su et al. 2021, https://arxiv.org/abs/2104.09864).

    Attributes:
        base: wavelengths grow from 2 pi to 2 pi * base tokens over the rotated dimensions.
        fraction: share of each head's dimensions that is rotated; the rest carries no position.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    base: float = 10_000.0
    fraction: float = 1.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not self.base > 1:
            raise ValueError(f"base={self.base!r}: a number above 1 is allowed; try base=10000")
        if not 0 < self.fraction <= 1:
            raise ValueError(
                f"fraction={self.fraction!r}: a number above 0 and at most 1 is allowed; try fraction=1"
            )
