"""Budget of a run, and rate, momentum, windows and further targets by the share of it that is spent."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from windowlm.training.config import DEFAULT_BUDGET_SECONDS, OptimizerConfig, TrainerConfig


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What a run has used so far: optimizer steps, trained tokens, seconds of training."""

    steps: int
    tokens: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Exactly one of the three is set, above 0."""

    steps: int | None = None
    tokens: int | None = None
    seconds: float | None = None

    @classmethod
    def of(cls, config: TrainerConfig) -> "Budget":
        """The budget that the settings give, or the default in seconds."""
        if config.max_steps is None and config.max_tokens is None and config.max_seconds is None:
            return cls(seconds=DEFAULT_BUDGET_SECONDS)
        return cls(steps=config.max_steps, tokens=config.max_tokens, seconds=config.max_seconds)

    def progress(self, spent: Spent) -> float:
        """Share of the budget that is used; 1 or more when the run is done."""
        limit = self.steps or self.tokens or self.seconds
        assert limit is not None
        return self.used(spent) / limit

    def used(self, spent: Spent) -> float:
        """What is spent of the quantity that is limited."""
        if self.steps is not None:
            return spent.steps
        return spent.tokens if self.tokens is not None else spent.seconds

    def __str__(self) -> str:
        if self.steps is not None:
            return f"{self.steps:,} steps"
        if self.tokens is not None:
            return f"{self.tokens:,} tokens"
        return f"{self.seconds:g} seconds"


def learning_rate_factor(config: OptimizerConfig, progress: float) -> float:
    """Learning rate as a share of the peak.

    Warm-up rises linearly over ``warmup_fraction``. After it ``cosine`` is half a cosine (Loshchilov and
    Hutter 2017, without restarts) and ``warmup_stable_decay`` a plateau and then a linear fall (Hu et al.
    2024, MiniCPM), both down to ``final_lr_fraction``.

    Args:
        config: schedule, fractions.
        progress: share of the budget used in the middle of the step.
    """
    progress = min(max(progress, 0.0), 1.0)
    if progress < config.warmup_fraction:
        return progress / config.warmup_fraction
    if config.schedule == "constant":
        return 1.0
    final = config.final_lr_fraction
    if config.schedule == "cosine":
        fallen = (progress - config.warmup_fraction) / max(1 - config.warmup_fraction, 1e-12)
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * fallen))
    start = 1 - config.decay_fraction
    if progress <= start:
        return 1.0
    return 1 - (1 - final) * (progress - start) / config.decay_fraction


FIRST_MOMENTUM = 0.85


def muon_momentum(config: OptimizerConfig, progress: float) -> float:
    """Decay of Muon's running mean, which rises linearly over ``muon_momentum_warmup``.

    Args:
        config: the decay, and the share of the budget over which it rises.
        progress: share of the budget used in the middle of the step.
    """
    if progress >= config.muon_momentum_warmup:
        return config.muon_momentum
    first = min(FIRST_MOMENTUM, config.muon_momentum)
    return first + (config.muon_momentum - first) * max(progress, 0.0) / config.muon_momentum_warmup


@dataclass(frozen=True, kw_only=True)
class WindowWarmup:
    """Windows that grow while a model trains, as in modded-nanogpt: early on far keys teach little and cost
    time.

    Attributes:
        limits: most keys that a window shows in each stage; None, in the last, for no limit.
        fraction: share of the budget that the stages with a limit divide evenly.
    """

    limits: tuple[int | None, ...] = (None,)
    fraction: float = 0.0

    @classmethod
    def of(cls, config: TrainerConfig, windows: Sequence[int | None]) -> "WindowWarmup":
        """The stages that the settings ask for: the limit doubles until it reaches the largest window."""
        limits: list[int | None] = []
        limit, largest = config.window_warmup, max((window for window in windows if window), default=0)
        while limit is not None and limit < largest:
            limits.append(limit)
            limit *= 2
        return cls(limits=(*limits, None), fraction=config.window_warmup_fraction)

    def stage(self, progress: float) -> int:
        """Place in ``limits`` at this share of the budget."""
        limited = len(self.limits) - 1
        if not limited or progress >= self.fraction:
            return limited
        return min(int(progress / self.fraction * limited), limited - 1)


@dataclass(frozen=True, kw_only=True)
class FurtherTargets:
    """Tokens behind the next one that training predicts as well, and how they lose their weight.

    Attributes:
        count: how many, 0 for none.
        fraction: share of the budget after which none has weight.
    """

    count: int = 0
    fraction: float = 0.0

    def weights(self, progress: float) -> list[float]:
        """Of those that have weight, the nearest first, where the next token has 1.

        The fraction is cut into ``count`` equal shares. The k-th of the targets has ``2 ** -k`` and falls
        linearly to 0 within one share, that of the farthest being the first.

        Args:
            progress: share of the budget that is used.
        """
        if not self.count or progress >= self.fraction:
            return []
        share = self.fraction / self.count
        falls = ((self.count - k + 1) - max(progress, 0.0) / share for k in range(1, self.count + 1))
        return [0.5**k * min(left, 1.0) for k, left in enumerate(falls, 1) if left > 0]
