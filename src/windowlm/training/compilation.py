"""The decoder compiled for training: one graph from tokens to hidden states."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor

from windowlm.model.decoder import Decoder
from windowlm.training.float8 import float8_view

HiddenStates = Callable[..., Tensor]


def is_compiled(setting: Literal["auto", "on", "off"], device: torch.device) -> bool:
    """Whether a run compiles: ``auto`` does on a GPU."""
    return setting == "on" or (setting == "auto" and device.type == "cuda")


def hidden_states(model: Decoder, *, compiled: bool, float8: bool = False) -> HiddenStates:
    """``model.hidden``, compiled or not; the model itself stays as it is, for checkpoints and evaluation.

    A graph that must be compiled anew too often raises, where torch would go on uncompiled. With ``float8``
    the blocks multiply in float8.
    """
    hidden = _compiled_hidden() if compiled else Decoder.hidden
    if not float8:
        return partial(hidden, model)
    views: list[Decoder] = []

    def hidden_in_float8(*arguments: Any, **options: Any) -> Tensor:
        if not views:  # not before the model is on its device and in its dtype
            views.append(float8_view(model))
        states: Tensor = hidden(views[0].train(model.training), *arguments, **options)
        return states

    return hidden_in_float8


@cache
def _compiled_hidden() -> Any:
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(Decoder.hidden, fullgraph=True)
