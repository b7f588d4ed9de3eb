"""Our own kernels for windows: tiles of packed query heads, fitted to the window's edge.

Shapes: B batch, T queries, S keys, H query heads, K key-value heads, D head dimension, G packs of query
heads, P places of a pack's queries.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..differentiable import Computation, differentiable
from ..window import Bounds, Visibility
from .capability import Capabilities

CAPABILITIES = Capabilities(
    purpose="own Triton kernels, tiles fitted to the window",
    missing=None if find_spec("triton") else "it needs the package triton, which is not installed",
    devices=frozenset({"cuda"}),
    compute_capability=(8, 0),
    dtypes=frozenset({torch.bfloat16, torch.float16}),
    head_dim_limit=128,
    bidirectional=False,
    sinks=False,
    documents=True,
    separate_keys=False,
    more_keys=True,
    dropout=False,
    gradients=True,
)

LARGEST_PACK = 16  # no tile has fewer rows
ALIGNED_NUMBERS = 16
# Up to here few tiles are seen whole, and a loop of their own costs more than masking them.
SMALL_WINDOW = 128
# Shared memory of a block on an H100, which the largest tiles fill.
ROOMY_BYTES = 227 * 1024


@dataclass(frozen=True)
class Tiles:
    """Sizes of a kernel's tiles, warps and pipeline stages."""

    rows: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Schedule:
    """Tiles of the three kernels."""

    forward: Tiles
    query_gradient: Tiles
    key_value_gradient: Tiles


def schedule_for(head_dim: int, window: int, packed: bool, roomy: bool) -> Schedule:
    """Tiles by head dimension, window, whether rows hold documents, and whether the GPU has `ROOMY_BYTES`
    of shared memory: the fastest measured on an H100.
    """
    if head_dim <= 64:
        query_gradient = Tiles(64, 32, 4, 3)
        if window <= 512:
            forward = Tiles(64, 32, 4, 3) if packed else Tiles(64, 64, 4, 2)
            return Schedule(forward, query_gradient, Tiles(64, 64, 4, 2))
        forward = Tiles(128, 64, 4, 3) if packed else Tiles(64, 64, 4, 3)
        return Schedule(forward, query_gradient, Tiles(64, 64, 4, 3))
    if window >= 2048:
        if roomy and not packed:
            return Schedule(Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 4), Tiles(32, 64, 4, 4))
        return Schedule(Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 2), Tiles(32, 64, 4, 3))
    if window <= SMALL_WINDOW:
        key_value_gradient = Tiles(32, 128, 8, 3) if roomy and not packed else Tiles(32, 64, 4, 3)
        return Schedule(Tiles(64, 32, 4, 2), Tiles(64, 32, 4, 3), key_value_gradient)
    return Schedule(Tiles(128, 32, 4, 3), Tiles(64, 64, 4, 2), Tiles(32, 64, 4, 3))


def attend(
    query_BTHD: Tensor,
    key_BSKD: Tensor,
    value_BSKD: Tensor,
    visibility: Visibility,
    *,
    scale: float,
    dropout: float,
) -> Tensor:
    """Attention of the queries over their visible keys; returns [B, T, H, D]."""
    assert dropout == 0.0
    (batch, queries), keys = query_BTHD.shape[:2], key_BSKD.shape[1]
    bounds = None
    if visibility.documents is not None:
        bounds = Bounds(*_of_each_row(visibility.bounds(queries, keys, query_BTHD.device), batch))
    window = keys if visibility.window is None else min(visibility.window, keys)
    query_BTHD, key_BSKD, value_BSKD = map(_reachable, (query_BTHD, key_BSKD, value_BSKD))
    ranges = (None,) * 3 if bounds is None else (bounds.first_keys, bounds.last_queries, bounds.gaps)
    return _attention(query_BTHD, key_BSKD, value_BSKD, *ranges, window, scale)


def forward(
    query_BTHD: Tensor,
    key_BSKD: Tensor,
    value_BSKD: Tensor,
    ranges: Sequence[Tensor],
    window: int,
    scale: float,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs [B, T, H, D] and log2 of the softmax's denominators, as `_each_query` holds them."""
    from .band_kernels import forward_kernel

    batch, queries, heads, head_dim = query_BTHD.shape
    kv_heads = key_BSKD.shape[2]
    tiles = tiles or schedule_for(head_dim, window, bool(ranges), roomy(query_BTHD.device)).forward
    pack = _pack(heads // kv_heads)
    output_BTHD, normalizer_BGP = _empty_like(query_BTHD), _each_query(query_BTHD, pack)
    first_last_gaps = ranges or [normalizer_BGP] * 3  # not read
    grid = (-(-queries // (tiles.rows // pack)) * (batch * heads // pack),)
    forward_kernel[grid](
        query_BTHD, key_BSKD, value_BSKD, output_BTHD, normalizer_BGP, *first_last_gaps,
        *_strides(query_BTHD, key_BSKD, value_BSKD, output_BTHD), normalizer_BGP.shape[2],
        heads, heads // kv_heads, queries, key_BSKD.shape[1], window, scale * LOG2_E,
        D=head_dim, DIM=power_of_two(head_dim), R=tiles.rows, N=tiles.keys, PACK=pack,
        BOUNDED=bool(ranges), MOSTLY_FULL=window > SMALL_WINDOW, STAGES=tiles.stages, num_warps=tiles.warps,
    )  # fmt: skip
    return output_BTHD, normalizer_BGP


def backward(
    query_BTHD: Tensor,
    key_BSKD: Tensor,
    value_BSKD: Tensor,
    output_BTHD: Tensor,
    normalizer_BGP: Tensor,
    gradient_BTHD: Tensor,
    ranges: Sequence[Tensor],
    window: int,
    scale: float,
    schedule: Schedule | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    from .band_kernels import key_value_gradient_kernel, query_gradient_kernel

    batch, queries, heads, head_dim = query_BTHD.shape
    keys, kv_heads = key_BSKD.shape[1:3]
    schedule = schedule or schedule_for(head_dim, window, bool(ranges), roomy(query_BTHD.device))
    query_gradient, key_gradient, value_gradient = map(_empty_like, (query_BTHD, key_BSKD, value_BSKD))
    delta_BGP = torch.empty_like(normalizer_BGP)
    first_last_gaps = ranges or [normalizer_BGP] * 3  # not read
    pack = _pack(heads // kv_heads)
    shared = {
        "D": head_dim,
        "DIM": power_of_two(head_dim),
        "BOUNDED": bool(ranges),
        "MOSTLY_FULL": window > SMALL_WINDOW,
    }
    tiles = schedule.query_gradient
    grid = (-(-queries // (tiles.rows // pack)) * (batch * heads // pack),)
    # Before the other kernel, which reads the products of output and gradient that this one leaves.
    query_gradient_kernel[grid](
        query_BTHD, key_BSKD, value_BSKD, output_BTHD, gradient_BTHD, query_gradient, normalizer_BGP,
        delta_BGP, *first_last_gaps,
        *_strides(query_BTHD, key_BSKD, value_BSKD, output_BTHD, gradient_BTHD, query_gradient),
        normalizer_BGP.shape[2], heads, heads // kv_heads, queries, keys, window, scale, scale * LOG2_E,
        R=tiles.rows, N=tiles.keys, PACK=pack, STAGES=tiles.stages, num_warps=tiles.warps, **shared,
    )  # fmt: skip
    tiles = schedule.key_value_gradient
    grid = (-(-keys // tiles.keys) * batch * kv_heads,)
    key_value_gradient_kernel[grid](
        query_BTHD, key_BSKD, value_BSKD, gradient_BTHD, key_gradient, value_gradient, normalizer_BGP,
        delta_BGP, *first_last_gaps,
        *_strides(query_BTHD, key_BSKD, value_BSKD, gradient_BTHD, key_gradient, value_gradient),
        normalizer_BGP.shape[2], kv_heads, heads // kv_heads, queries, keys, window, scale, scale * LOG2_E,
        R=tiles.rows, N=tiles.keys, PACK=pack, STAGES=tiles.stages, num_warps=tiles.warps, **shared,
    )  # fmt: skip
    return query_gradient, key_gradient, value_gradient


LOG2_E = 1.4426950408889634


def _of_each_row(bounds: Bounds, batch: int) -> Iterator[Tensor]:
    """The bounds with a row for each of the batch, as the kernels read them."""
    for tensor in bounds:
        yield tensor.expand(batch, -1).contiguous() if tensor.dim() == 2 else tensor


def roomy(device: torch.device) -> bool:
    """Whether a block may have `ROOMY_BYTES` of shared memory."""
    if device.type != "cuda":
        return False
    # AMD's GPUs do not tell.
    most = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)
    return bool(most >= ROOMY_BYTES)


def _pack(group_size: int) -> int:
    """Query heads beside each other in a tile: the largest power of two that divides the group."""
    return min(group_size & -group_size, LARGEST_PACK)


def _each_query(query_BTHD: Tensor, pack: int) -> Tensor:
    """Room for a float32 of each query, in the order of a tile's rows: `band_kernels` reads several at once,
    where rows begin at multiples of `ALIGNED_NUMBERS`.
    """
    batch, queries, heads, _dim = query_BTHD.shape
    places = -(-queries * pack // ALIGNED_NUMBERS) * ALIGNED_NUMBERS
    return query_BTHD.new_empty((batch, heads // pack, places), dtype=torch.float32)


def power_of_two(size: int) -> int:
    """The smallest that holds so many and that a tensor core's product takes."""
    return max(16, 1 << (size - 1).bit_length())


def rows_contiguous(tensor: Tensor) -> Tensor:
    """The same with its last dimension contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _reachable(tensor_BTHD: Tensor) -> Tensor:
    """The same as the kernels read it: rows contiguous, and heads no further apart than 32 bits tell."""
    if tensor_BTHD.shape[2] * tensor_BTHD.stride(2) >= 2**31:
        return tensor_BTHD.contiguous()
    return rows_contiguous(tensor_BTHD)


def _empty_like(tensor: Tensor) -> Tensor:
    """An empty tensor that lies in memory like this one, rows contiguous in any case.

    torch orders dimensions by their strides, and those of dimensions of one entry may say anything.
    """
    empty = torch.empty_like(tensor)
    return empty if empty.stride(-1) == 1 else tensor.new_empty(tensor.shape)


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def _compute(
    query_BTHD: Tensor, key_BSKD: Tensor, value_BSKD: Tensor, *ranges_window_scale: Any
) -> tuple[Tensor, Tensor]:
    *ranges, window, scale = ranges_window_scale
    return forward(query_BTHD, key_BSKD, value_BSKD, _given(ranges), window, scale)


def _compute_gradients(
    gradient_BTHD: Tensor, query_BTHD: Tensor, key_BSKD: Tensor, value_BSKD: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *ranges, window, scale, output_BTHD, normalizer_BGP = others
    return backward(
        query_BTHD, key_BSKD, value_BSKD, output_BTHD, normalizer_BGP, _reachable(gradient_BTHD),
        _given(ranges), window, scale,
    )  # fmt: skip


def _given(ranges: list[Tensor | None]) -> list[Tensor]:
    return [each for each in ranges if each is not None]


def _empty_outputs(query_BTHD: Tensor, key_BSKD: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    pack = _pack(query_BTHD.shape[2] // key_BSKD.shape[2])
    return _empty_like(query_BTHD), _each_query(query_BTHD, pack)


def _empty_gradients(gradient_BTHD: Tensor, *heads: Any) -> tuple[Tensor, ...]:
    return tuple(map(_empty_like, heads[:3]))


_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? first_keys, Tensor? last_queries, Tensor? gaps, "
    "int window, float scale"
)
_attention = differentiable(
    "band",
    __name__,
    _ARGUMENTS,
    Computation(_compute, _empty_outputs),
    Computation(_compute_gradients, _empty_gradients),
    keeps_outputs=True,
)
