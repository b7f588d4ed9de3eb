"""torch's own FlashAttention over packed sequences, `torch.nn.attention.varlen.varlen_attn`.

Its docstring calls `window_size=(W, 0)` a window of W, but the query then sees W + 1 keys, its own on top.

Shapes: B batch, T queries, S keys, H query heads, K key-value heads, D head dimension.
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from ..window import Visibility
from .capability import Capabilities
from .flash4 import silence_padding
from .readable_heads import aligned

UNLIMITED = -1
# Grouped heads need no word in torch 2.11 and 2.12; later versions refuse them without one.
GROUPED: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)


CAPABILITIES = Capabilities(
    purpose="torch's FlashAttention over packed sequences",
    devices=frozenset({"cuda"}),
    compute_capability=(8, 0),
    dtypes=frozenset({torch.bfloat16, torch.float16}),
    head_dim_limit=256,
    head_dim_multiple=8,
    bidirectional=True,
    sinks=False,
    documents=True,
    gaps=False,
    separate_keys=False,
    more_keys=True,
    dropout=False,
    gradients=True,
)


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
    batch, queries = query_BTHD.shape[:2]
    segments = visibility.segments(batch, queries, query_BTHD.device)
    of_keys = segments
    if key_BSKD.shape[1] != queries:
        of_keys = visibility.segments(batch, key_BSKD.shape[1], query_BTHD.device)
    behind, ahead = (UNLIMITED if side is None else side for side in visibility.reach)
    output: Any = varlen_attn(
        aligned(query_BTHD.flatten(0, 1)),
        aligned(key_BSKD.flatten(0, 1)),
        aligned(value_BSKD.flatten(0, 1)),
        segments.offsets,
        of_keys.offsets,
        segments.longest,
        of_keys.longest,
        scale=scale,
        window_size=(behind, ahead),
        **GROUPED,
    )
    return silence_padding(output.view_as(query_BTHD), segments)
