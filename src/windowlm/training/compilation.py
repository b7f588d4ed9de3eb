"""The decoder compiled for training: one graph from tokens to hidden states."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor

from windowlm.model.decoder import Decoder

HiddenStates = Callable[..., Tensor]


def is_compiled(setting: Literal["auto", "on", "off"], device: torch.device) -> bool:
    """Whether a run compiles: ``auto`` does on a GPU."""
    return setting == "on" or (setting == "auto" and device.type == "cuda")


def hidden_states(model: Decoder, *, compiled: bool) -> HiddenStates:
    """``model.hidden``, compiled or not; the model itself stays as it is, for checkpoints and evaluation.

    A graph that must be compiled anew too often raises, where torch would go on uncompiled.
    """
    return partial(_compiled_hidden(), model) if compiled else model.hidden


@cache
def _compiled_hidden() -> Any:
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(Decoder.hidden, fullgraph=True)
