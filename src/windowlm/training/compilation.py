"""The decoder compiled for training: one graph from tokens to hidden states for each set of windows."""

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor

from windowlm.model.decoder import Decoder, Visibilities
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
    if not compiled and not float8:
        return model.hidden
    views = [] if float8 else [model]

    def hidden(tokens_BT: Tensor, *, visibilities: Visibilities) -> Tensor:
        if not views:  # not before the model is on its device and in its dtype
            views.append(float8_view(model))
        decoder = views[0] if views[0] is model else views[0].train(model.training)
        windows = tuple(visibility.window for visibility in visibilities.values())
        states_BTD: Tensor = (_compiled_hidden(windows) if compiled else _hidden)(
            decoder, tokens_BT, visibilities
        )
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
