"""The average of the weights over the last steps of a run.

Averages of iterates get close to what a decaying rate would reach (Polyak and Juditsky 1992). Which steps
count is a share of those taken so far (Shamir and Zhang 2013, arXiv:1212.1824), so that no length of the run
enters.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class WeightAverage:
    """A mean in float32 that forgets at a rate of one over so many steps.

    Args:
        share: steps that count, as a share of those so far, above 0 and at most 1: the mean moves by
            ``1 / (share * step)`` of the way to the weights, and 1 averages all steps alike.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self._means: list[Tensor] = []

    @torch.no_grad()
    def update(self, weights: Iterable[Tensor], step: int) -> None:
        """Add the weights after a step, the first being 1, always in the same order."""
        wide = [weight.detach().float() for weight in weights]
        if not self._means:
            self._means = [weight.clone() for weight in wide]
            return
        self._means = [mean.to(weight.device) for mean, weight in zip(self._means, wide, strict=True)]
        torch._foreach_lerp_(self._means, wide, min(1.0, 1 / (self.share * step)))

    @contextmanager
    def in_place_of(self, weights: Iterable[Tensor]) -> Iterator[None]:
        """Put the average into the weights, and their own values back in the end."""
        if not self._means:
            yield
            return
        weights = [weight.detach() for weight in weights]
        own = [weight.clone() for weight in weights]
        for weight, mean in zip(weights, self._means, strict=True):
            weight.copy_(mean)
        try:
            yield
        finally:
            for weight, value in zip(weights, own, strict=True):
                weight.copy_(value)

    def state_dict(self) -> list[Tensor]:
        """The means; none before the first step."""
        return self._means

    def load_state_dict(self, means: list[Tensor]) -> None:
        """Go on from them."""
        self._means = [mean.clone() for mean in means]
