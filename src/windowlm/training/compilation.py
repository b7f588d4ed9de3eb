"""The decoder compiled for training: one graph from tokens to hidden states for each set of windows."""

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor

from windowlm.model.decoder import Decoder, Visibilities

HiddenStates = Callable[..., Tensor]


def is_compiled(setting: Literal["auto", "on", "off"], device: torch.device) -> bool:
    """Whether a run compiles: ``auto`` does on a GPU."""
    return setting == "on" or (setting == "auto" and device.type == "cuda")


def hidden_states(model: Decoder, *, compiled: bool) -> HiddenStates:
    """``model.hidden``, compiled or not; the model itself stays as it is, for checkpoints and evaluation.

    A graph that must be compiled anew too often raises, where torch would go on uncompiled.
    """
    if not compiled:
        return model.hidden

    def hidden(tokens_BT: Tensor, *, visibilities: Visibilities) -> Tensor:
        windows = tuple(visibility.window for visibility in visibilities.values())
        states_BTD: Tensor = _compiled_hidden(windows)(model, tokens_BT, visibilities)
        return states_BTD

    return hidden


def forget_compiled() -> None:
    """Drop the graphs of earlier runs of a sweep, which count against the number that torch allows."""
    torch._dynamo.reset()


def _hidden(model: Decoder, tokens_BT: Tensor, visibilities: Visibilities) -> Tensor:
    return model.hidden(tokens_BT, visibilities=visibilities)


@cache
def _compiled_hidden(windows: tuple[int | None, ...]) -> Any:
    """A function of their own for windows, as torch makes a symbol of a number that varies between the calls
    of one function, which it knows by name and place: kernels would then be compiled for no window at all.
    """
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    name = "_".join(["hidden", *(str(window).lower() for window in windows)])
    of_windows = FunctionType(_hidden.__code__.replace(co_name=name), globals(), name)
    return torch.compile(of_windows, fullgraph=True)
