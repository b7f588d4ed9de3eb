"""The window as others count it: conversions to and from their arguments.

Here a window W counts the keys that a query sees, itself included; see `window.py`. Each pair of functions
holds for self-attention over as many keys as queries, and raises ValueError for what the other side cannot
say and for arguments of another kind: numbers are whole, and True is none. `to_` functions give a window
beyond 2^30 + 1, longer than any sequence, as that; a bidirectional window of 1 may come back as the causal
one, which shows the same.
`docs/attention-window.md` has the table.

Shapes: T queries, S keys.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .window import check_causal, check_window, reach, within_window

UNLIMITED = -1
SHOWN_QUERIES = 8
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Window(NamedTuple):
    """Keys a query sees, itself included (None: no limit), and whether later ones are hidden."""

    window: int | None
    causal: bool = True


def to_flash_attention(window: int | None, causal: bool = True) -> tuple[int, int]:
    """`window_size` of flash-attn and of torch's `varlen_attn`: keys before and after, -1 for no limit.

    Megatron's and Transformer Engine's `window_size` is the same tuple.
    """
    check_causal(causal)
    if check_window(window) is None:
        return UNLIMITED, 0 if causal else UNLIMITED
    assert window is not None
    return reach(window, causal)


def from_flash_attention(window_size: tuple[int, int], causal: bool = False) -> Window:
    """The window of a `window_size` tuple of flash-attn, `varlen_attn` or Megatron, beside their `causal`."""
    check_causal(causal)
    if not isinstance(window_size, tuple | list) or len(window_size) != 2:
        raise ValueError(
            f"window_size={window_size!r}: two numbers, keys before and after, are allowed; "
            "try window_size=(511, 0)"
        )
    left, right = window_size
    for side in (left, right):
        if not _is_whole(side) or side < UNLIMITED:
            raise ValueError(
                f"window_size={window_size!r}: whole numbers from 0 on, and -1 for no limit, are allowed; "
                "try window_size=(511, 0)"
            )
    return _of_sides(left, right, causal, f"window_size={window_size!r}", f"window_size=({left}, 0)")


def _of_sides(left: int, right: int, causal: bool, given: str, good: str) -> Window:
    causal = causal or right == 0
    if not causal and left != right:
        raise ValueError(f"{given}: two equal numbers, or 0 as the second, are allowed; try {good}")
    return Window(None if left == UNLIMITED else left + 1, causal)


def to_transformers(window: int | None, causal: bool = True) -> int | None:
    """`sliding_window` of transformers: the same number, but keys on each side in bidirectional models."""
    check_causal(causal)
    if check_window(window) is None:
        return None
    assert window is not None
    behind, _ = reach(window, causal)
    return behind + 1 if causal else behind


def from_transformers(sliding_window: int | None, causal: bool = True) -> Window:
    """The window of a `sliding_window` of transformers."""
    check_causal(causal)
    if sliding_window is None or causal:
        return Window(check_window(sliding_window, "sliding_window"), causal)
    if not _is_whole(sliding_window) or sliding_window < 0:
        raise ValueError(
            f"sliding_window={sliding_window!r}: a whole number from 0 on (keys seen on each side) "
            "or None is allowed; try sliding_window=511"
        )
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
    if not _is_whole(is_causal) or is_causal not in (0, 1):
        raise ValueError(f"is_causal={is_causal!r}: 0 or 1 is allowed; try is_causal=1")
    for name, size in (("left_window_size", left_window_size), ("right_window_size", right_window_size)):
        if not _is_whole(size) or size < UNLIMITED:
            raise ValueError(
                f"{name}={size!r}: a whole number from 0 on, or -1 for no limit, is allowed; try {name}=-1"
            )
    return _of_sides(
        left_window_size,
        right_window_size,
        bool(is_causal),
        f"left_window_size={left_window_size}, right_window_size={right_window_size}",
        f"right_window_size={left_window_size}",
    )


def to_local_attention(window: int) -> dict[str, Any]:
    """Arguments of `LocalAttention` of the package local-attention for a causal window from 2 on."""
    if check_window(window) is None or window == 1:
        raise ValueError(
            f"window={window!r}: a number from 2 on is allowed, as local-attention has a window of 2 keys at "
            "least; try window=2"
        )
    return {
        "window_size": reach(window, True)[0],
        "causal": True,
        "exact_windowsize": True,
        "look_backward": 1,
        "look_forward": 0,
    }


def from_local_attention(
    window_size: int,
    exact_windowsize: bool = False,
    look_backward: int = 1,
    causal: bool = True,
    look_forward: int | None = None,
) -> Window:
    """The causal window of `LocalAttention`, which has one only where `exact_windowsize` is on."""
    check_causal(causal)
    if not isinstance(exact_windowsize, bool):
        raise ValueError(f"exact_windowsize={exact_windowsize!r}: True or False is allowed; try True")
    for name, number, least in (("window_size", window_size, 1), ("look_backward", look_backward, 0)):
        if not _is_whole(number) or number < least:
            raise ValueError(
                f"{name}={number!r}: a whole number from {least} on is allowed; try {name}={max(least, 1)}"
            )
    if look_forward is not None and (not _is_whole(look_forward) or look_forward != 0):
        raise ValueError(
            f"look_forward={look_forward!r}: a causal window looks at no later block; try look_forward=0"
        )
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
    check_causal(causal)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return within_window(query - key, window, causal)

    return visible


def from_mask_mod(mask_mod: MaskMod, length: int) -> Window:
    """The window of a `mask_mod`, found by asking it for all pairs of `length` tokens; see `from_mask`.

    Raises:
        ValueError: where it is no function of four arguments that takes tensors of indices, the length no
            whole number from 2 on, or its answer not in bool and one for each pair, and as `from_mask`.
    """
    if not callable(mask_mod) or not _takes_four(mask_mod):
        raise ValueError(f"mask_mod={mask_mod!r}: a function of four, batch, head, query and key, is allowed")
    if not _is_whole(length) or length < 2:
        raise ValueError(f"length={length!r}: a whole number from 2 on is allowed; try length=1024")
    index_T = torch.arange(length)
    zero = torch.zeros((), dtype=torch.int64)
    try:
        visible = mask_mod(zero, zero, index_T[:, None], index_T[None, :])
    except (RuntimeError, TypeError, IndexError) as error:
        raise ValueError(
            f"mask_mod fails on queries [{length}, 1] and keys [1, {length}] ({error}): a function of "
            "tensors of indices is allowed, without `if` and lists"
        ) from error
    if not isinstance(visible, Tensor) or visible.dtype != torch.bool:
        given = visible.dtype if isinstance(visible, Tensor) else type(visible).__name__
        raise ValueError(f"mask_mod gives {given}: a tensor of bool is allowed, True for visible")
    if visible.dim() > 2 or any(size not in (1, length) for size in visible.shape):
        raise ValueError(
            f"mask_mod gives shape {tuple(visible.shape)} for queries [{length}, 1] and keys [1, {length}]: "
            "one answer for each pair is allowed"
        )
    # It is asked for one pair at a time where it is used, and need not look at both.
    return from_mask(visible.expand(length, length))


def from_mask(visible_TT: Tensor) -> Window:
    """The window that a mask (bool, True = visible) shows, found by comparing it with all windows.

    A window of T or more shows T tokens the same as none, and is told as None: take more tokens than the
    largest window that may be meant. Of a bidirectional window of 1 and the causal one, equal too, it is the
    causal one.

    Raises:
        ValueError: for what is no square mask of 2 tokens or more in bool, and where no window shows exactly
            these keys.
    """
    if not isinstance(visible_TT, Tensor):
        raise ValueError(f"visible_TT is a {type(visible_TT).__name__}: a torch tensor is allowed")
    tokens = len(visible_TT) if visible_TT.dim() else 0
    if visible_TT.shape != (tokens, tokens) or tokens < 2 or visible_TT.dtype != torch.bool:
        raise ValueError(
            f"visible_TT has shape {tuple(visible_TT.shape)} and dtype {visible_TT.dtype}: "
            "[tokens, tokens] from 2 tokens on and bool (True for visible) are allowed"
        )
    index_T = torch.arange(tokens, device=visible_TT.device)
    distance_TT = index_T[:, None] - index_T
    for causal in (True, False):
        for window in (None, *range(1, tokens)):
            if torch.equal(within_window(distance_TT, window, causal), visible_TT):
                return Window(window, causal)
    counts = ", ".join(map(str, visible_TT[:SHOWN_QUERIES].sum(1).tolist()))
    raise ValueError(
        f"a mask in which {tokens} queries see {counts}{', ...' if tokens > SHOWN_QUERIES else ''} keys: "
        "a window shows each query the same keys around it"
    )


def _takes_four(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind(*range(4))
    except TypeError:
        return False
    except ValueError:
        pass  # of builtins, whose arguments are not told
    return True


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
