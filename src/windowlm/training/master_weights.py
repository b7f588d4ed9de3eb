"""Weights in a narrow dtype, trained through copies in float32.

In bfloat16 an update below 1/256 of a weight is rounded away; the copies keep it (Micikevicius et al. 2018,
Mixed Precision Training, arXiv:1710.03740, section 3.1).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, overload

import torch
from torch import Tensor

MASTERS = "masters"  # key of the copies in a state


def float32_copies(weights: Iterable[Tensor]) -> dict[Tensor, Tensor]:
    """A leaf in float32 for each weight."""
    return {weight: weight.detach().to(torch.float32, copy=True) for weight in weights}


class MasterWeights(torch.optim.Optimizer):
    """An optimizer of float32 copies whose results the weights follow.

    Its parameter groups hold the copies, so that rates, decay and state are the inner optimizer's. An
    attribute ``found_inf`` reaches it as well.

    Args:
        masters: the copy of each weight.
        optimizer: over all the copies.
    """

    def __init__(self, masters: Mapping[Tensor, Tensor], optimizer: torch.optim.Optimizer) -> None:
        self._weights, self._masters = list(masters), list(masters.values())
        self._optimizer = optimizer
        super().__init__(optimizer.param_groups, {})
        self.state = optimizer.state

    @property
    def masters(self) -> list[Tensor]:
        """The copies, in the order of the weights."""
        return self._masters

    def take_gradients(self) -> None:
        """Move the weights' gradients to the copies, in float32."""
        for weight, master in zip(self._weights, self._masters, strict=True):
            if weight.grad is not None:
                master.grad = weight.grad.to(torch.float32)
                weight.grad = None

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the copies and round them into the weights."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.take_gradients()
        # A checkpoint that is loaded replaces both.
        self._optimizer.param_groups, self._optimizer.state = self.param_groups, self.state
        if (found_inf := getattr(self, "found_inf", None)) is not None:
            self._optimizer.found_inf = found_inf  # type: ignore[attr-defined]
        self._optimizer.step()
        torch._foreach_copy_(self._weights, self._masters)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of weights and copies."""
        for tensor in (*self._weights, *self._masters):
            tensor.grad = None

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state, and the copies."""
        return {**super().state_dict(), MASTERS: self._masters}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore both.

        Raises:
            ValueError: the state is not of these weights.
        """
        saved = state_dict[MASTERS]
        if [tensor.shape for tensor in saved] != [master.shape for master in self._masters]:
            raise ValueError("the saved copies of the weights are not those of this model")
        for master, tensor in zip(self._masters, saved, strict=True):
            master.copy_(tensor)
        super().load_state_dict({name: value for name, value in state_dict.items() if name != MASTERS})
