"""Functions of a model compiled apart for each list of windows."""

from functools import cache
from types import FunctionType
from typing import Any

import torch


@cache
def compiled_for_windows(
    function: FunctionType, windows: tuple[int | None, ...], *, whole: bool = True, cuda_graphs: bool = False
) -> Any:
    """A function of their own for windows, as torch makes a symbol of a number that varies between the calls
    of one function, which it knows by name and place: kernels would then be compiled for no window at all.

    A graph that must be compiled anew too often raises, where torch would go on uncompiled.

    Args:
        function: of a model, or of a part of it.
        windows: of its layers.
        whole: whether it must be one graph.
        cuda_graphs: whether a GPU replays its passes as graphs of kernels.
    """
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    name = "_".join([function.__name__, *(str(window).lower() for window in windows)])
    of_windows = FunctionType(function.__code__.replace(co_name=name), function.__globals__, name)
    of_windows.__defaults__ = function.__defaults__
    return torch.compile(of_windows, fullgraph=whole, options={"triton.cudagraphs": cuda_graphs})
