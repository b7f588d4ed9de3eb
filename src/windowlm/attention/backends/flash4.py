"""flash-attn-4: kernels for Hopper and later GPUs, an optional package (Dao-AILab/flash-attention).

Shapes: B batch, T queries, S keys, H query heads, K key-value heads, D head dimension.
"""

from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

import torch
from torch import Tensor

from ..differentiable import Computation, differentiable
from ..operator import empty_contiguous_gradients
from ..window import Segments, Visibility
from ..window_conventions import from_flash_attention
from .capability import Capabilities
from .readable_heads import aligned


def _installed() -> bool:
    # By its name: flash-attn 2.8 has a folder `flash_attn.cute` too, with other functions.
    try:
        distribution("flash-attn-4")
    except PackageNotFoundError:
        return False
    return True


CAPABILITIES = Capabilities(
    purpose="flash-attn-4",
    missing=None if _installed() else "it needs the package flash-attn-4, which is not installed",
    devices=frozenset({"cuda"}),
    compute_capability=(9, 0),
    dtypes=frozenset({torch.bfloat16, torch.float16}),
    head_dim_limit=128,
    # At 16 the gradients of 4.0.0b36 are wrong.
    head_dim_least=32,
    head_dim_multiple=32,
    bidirectional=True,
    sinks=False,
    documents=True,
    gaps=False,
    separate_keys=False,
    more_keys=True,
    dropout=False,
    gradients=True,
    # On Hopper the parts of a query's gradient are added in the order in which they are ready.
    deterministic=False,
)


HOPPER = 9
# In this window and below, smaller tiles of keys than the package's own are faster on an H100.
SMALL_WINDOW = 512
SMALL_TILES = (192, 64)


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
    settings = (scale, visibility.causal, *visibility.reach)
    if visibility.documents is None:
        return _attention(query_BTHD, key_BSKD, value_BSKD, None, None, *settings)
    batch, queries = query_BTHD.shape[:2]
    segments = visibility.segments(batch, queries, query_BTHD.device)
    tokens = (tensor.flatten(0, 1) for tensor in (query_BTHD, key_BSKD, value_BSKD))
    output = _attention(*tokens, segments.offsets, segments.longest, *settings)
    return silence_padding(output.view_as(query_BTHD), segments)


def tiles_for(window: int | None, group_size: int, generation: int) -> tuple[int, int] | None:
    """Rows (queries times heads of a group) and keys of the forward's tiles; None: the package chooses."""
    small = window is not None and window <= SMALL_WINDOW
    # A tile's rows hold whole groups of heads, which share each key that they read.
    packed = group_size > 1 and SMALL_TILES[0] % group_size == 0
    return SMALL_TILES if generation == HOPPER and small and packed else None


def silence_padding(output_BTHD: Tensor, segments: Segments) -> Tensor:
    """Zero the outputs of padding, which packed kernels compute like those of any document."""
    if segments.real is None:
        return output_BTHD
    return output_BTHD.masked_fill(~segments.real[..., None, None], 0.0)


def _compute(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor | None,
    longest: int | None,
    scale: float,
    causal: bool,
    behind: int | None,
    ahead: int | None,
) -> tuple[Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_fwd

    query, key, value = map(aligned, (query, key, value))
    window = None if behind is None else from_flash_attention((behind, 0), causal=True).window
    generation, _ = torch.cuda.get_device_capability(query.device)
    output, normalizer, *_ = _flash_attn_fwd(
        query,
        key,
        value,
        cu_seqlens_q=offsets,
        cu_seqlens_k=offsets,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=scale,
        causal=causal,
        window_size_left=behind,
        window_size_right=ahead,
        return_lse=True,
        tile_mn=tiles_for(window, query.shape[-2] // key.shape[-2], generation),
    )
    return output.contiguous(), normalizer


def _compute_gradients(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor | None,
    longest: int | None,
    scale: float,
    causal: bool,
    behind: int | None,
    ahead: int | None,
    output: Tensor,
    normalizer: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_bwd

    query, key, value = map(aligned, (query, key, value))
    gradients = _flash_attn_bwd(
        query,
        key,
        value,
        output,
        gradient,
        normalizer,
        scale,
        causal,
        window_size_left=behind,
        window_size_right=ahead,
        cu_seqlens_q=offsets,
        cu_seqlens_k=offsets,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
    )
    # They lie as what was read, which may be a copy.
    query_gradient, key_gradient, value_gradient = (each.contiguous() for each in gradients)
    return query_gradient, key_gradient, value_gradient


def _empty_outputs(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    *batch, tokens, heads, _dim = query.shape
    return query.new_empty(query.shape), query.new_empty((*batch, heads, tokens), dtype=torch.float32)


_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? offsets, int? longest, float scale, bool causal, "
    "int? behind, int? ahead"
)
_attention = differentiable(
    "flash4",
    __name__,
    _ARGUMENTS,
    Computation(_compute, _empty_outputs),
    Computation(_compute_gradients, empty_contiguous_gradients),
    keeps_outputs=True,
)
