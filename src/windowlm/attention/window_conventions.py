"""The window as others count it: conversions to and from their arguments.

Here a window W counts the keys that a query sees, itself included; see `window.py`. Each pair of functions
holds for self-attention over as many keys as queries, and raises ValueError for what the other side cannot
say. `docs/attention-window.md` has the table.

Shapes: T queries, S keys.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .window import check_window, reach, within_window

UNLIMITED = -1
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Window(NamedTuple):
    """Keys a query sees, itself included (None: no limit), and whether later ones are hidden."""

    window: int | None
    causal: bool = True


def to_flash_attention(window: int | None, causal: bool = True) -> tuple[int, int]:
    """`window_size` of flash-attn and of torch's `varlen_attn`: keys before and after, -1 for no limit.

    Megatron's and Transformer Engine's `window_size` is the same tuple.
    """
    if check_window(window) is None:
        return UNLIMITED, 0 if causal else UNLIMITED
    assert window is not None
    return reach(window, causal)


def from_flash_attention(window_size: tuple[int, int], causal: bool = False) -> Window:
    """The window of a `window_size` tuple of flash-attn, `varlen_attn` or Megatron, beside their `causal`."""
    left, right = window_size
    if min(left, right) < UNLIMITED:
        raise ValueError(f"window_size={window_size!r}: numbers from 0 on, and -1 for no limit, are allowed")
    causal = causal or right == 0
    if not causal and left != right:
        raise ValueError(f"window_size={window_size!r}: two equal numbers, or 0 as the second, are allowed")
    return Window(None if left == UNLIMITED else left + 1, causal)


def to_transformers(window: int | None, causal: bool = True) -> int | None:
    """`sliding_window` of transformers: the same number, but keys on each side in bidirectional models."""
    if check_window(window) is None:
        return None
    assert window is not None
    return window if causal else reach(window, causal)[0]


def from_transformers(sliding_window: int | None, causal: bool = True) -> Window:
    """The window of a `sliding_window` of transformers."""
    if sliding_window is None or causal:
        return Window(check_window(sliding_window, "sliding_window"), causal)
    return Window(sliding_window + 1, causal)


def to_onnx(window: int | None, causal: bool = True) -> dict[str, int]:
    """Attributes of ONNX's `Attention` from opset 25 on."""
    left, right = to_flash_attention(window, causal)
    return {
        "is_causal": int(causal),
        "left_window_size": left,
        "right_window_size": UNLIMITED if causal else right,
    }


def from_onnx(is_causal: int = 0, left_window_size: int = -1, right_window_size: int = -1) -> Window:
    """The window of the attributes of ONNX's `Attention`; opsets before 25 have `is_causal` alone."""
    return from_flash_attention((left_window_size, right_window_size), bool(is_causal))


def to_local_attention(window: int) -> dict[str, Any]:
    """Arguments of `LocalAttention` of the package local-attention for a causal window from 2 on."""
    if check_window(window) is None or window == 1:
        raise ValueError(f"window={window!r}: local-attention sees 2 keys at least; try window=2")
    return {
        "window_size": reach(window, True)[0],
        "causal": True,
        "exact_windowsize": True,
        "look_backward": 1,
        "look_forward": 0,
    }


def from_local_attention(
    window_size: int, exact_windowsize: bool = False, look_backward: int = 1, causal: bool = True
) -> Window:
    """The causal window of `LocalAttention`, which has one only where `exact_windowsize` is on."""
    if not exact_windowsize or not causal:
        raise ValueError(
            f"exact_windowsize={exact_windowsize!r}, causal={causal!r}: without both a query sees from "
            f"{window_size * look_backward + 1} to {window_size * (look_backward + 1)} keys, by its place in "
            "its block; try exact_windowsize=True, causal=True"
        )
    return Window(window_size * look_backward + 1)


def to_mask_mod(window: int | None, causal: bool = True) -> MaskMod:
    """`mask_mod` for `create_block_mask` of torch's FlexAttention."""
    check_window(window)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return within_window(query - key, window, causal)

    return visible


def from_mask_mod(mask_mod: MaskMod, length: int) -> Window:
    """The window of a `mask_mod`, found by asking it for all pairs of `length` tokens."""
    index_T = torch.arange(length)
    zero = torch.zeros((), dtype=torch.int64)
    return from_mask(mask_mod(zero, zero, index_T[:, None], index_T[None, :]))


def from_mask(visible_TT: Tensor) -> Window:
    """The window that a mask (bool, True = visible) shows, found by comparing it with all windows.

    Raises:
        ValueError: where no window shows exactly these keys.
    """
    index_T = torch.arange(len(visible_TT), device=visible_TT.device)
    distance_TT = index_T[:, None] - index_T
    for causal in (True, False):
        for window in (None, *range(1, len(visible_TT))):
            if torch.equal(within_window(distance_TT, window, causal), visible_TT):
                return Window(window, causal)
    raise ValueError(
        f"a mask in which {len(visible_TT)} queries see {visible_TT.sum(1).tolist()} keys: "
        "a window shows each query the same keys around it"
    )
