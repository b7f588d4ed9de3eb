"""torch's fused attention in this package's layout.

Shapes: B batch, T queries, S keys, H query heads, K key-value heads, D head dimension.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..differentiable import first_derivatives_only
from .autocast import without_autocast
from .readable_heads import aligned, with_aligned_gradient


class Scoring(NamedTuple):
    """How scores become weights; the arguments of `dispatch.attention` that say nothing of visibility."""

    scale: float
    dropout: float
    sink_logits: Tensor | None = None
    logit_cap: float | None = None

    @property
    def fused(self) -> bool:
        """Whether torch's fused attention can compute it."""
        return self.sink_logits is None and self.logit_cap is None


def scaled_dot_product(
    query_BTHD: Tensor,
    key_BSKD: Tensor,
    value_BSKD: Tensor,
    causal: bool,
    scoring: Scoring,
) -> Tensor:
    """Attention [B, T, H, D] over all keys or all up to a query's own, without repeating key heads."""
    assert scoring.fused
    dtype, on_cpu = query_BTHD.dtype, query_BTHD.device.type == "cpu"
    with without_autocast(query_BTHD.device):
        if on_cpu:
            query_BTHD, key_BSKD, value_BSKD = widened(query_BTHD, key_BSKD, value_BSKD)
            query_BTHD, scale = with_exact_scale(query_BTHD, scoring.scale)
            scoring = scoring._replace(scale=scale)
        else:
            # cuDNN, which torch may choose, fails in its backward on a gradient that lies otherwise; heads
            # are copied with it.
            query_BTHD, key_BSKD, value_BSKD = map(aligned, (query_BTHD, key_BSKD, value_BSKD))
        output_BTHD = _fused(query_BTHD, key_BSKD, value_BSKD, causal, scoring)
        if not on_cpu:
            output_BTHD = with_aligned_gradient(output_BTHD)
    return output_BTHD.to(dtype)


def widened(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In float32 where they are narrower, for torch's kernels on a CPU.

    These take up to seven times as long in float16, and lose half the digits of dq where one weight is near
    1: their backward pass starts from the rounded output.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    return query.to(wide), key.to(wide), value.to(wide)


def with_exact_scale(query: Tensor, scale: float) -> tuple[Tensor, float]:
    """Query and scale of the same scores, of which the scale is a power of two.

    Forward and backward multiply scores by it in different places. Where that rounds, the weights that are
    computed again do not fit the softmax's denominators: gradients erred up to ten times as much as the
    formula's at scores of some tens.
    """
    fraction, exponent = math.frexp(scale)
    return (query, scale) if fraction == 0.5 else (query * fraction, 2.0**exponent)


def for_kernel(tensor_BTHD: Tensor) -> Tensor:
    """The same as [B, H, T, D]; a copy where torch's kernel cannot step through it, for which its function
    makes the whole matrix of weights.
    """
    if tensor_BTHD.stride(-1) != 1 or 0 in tensor_BTHD.stride():
        tensor_BTHD = tensor_BTHD.contiguous()
    return tensor_BTHD.transpose(1, 2)


def grouped(query_BTHD: Tensor, key_BSKD: Tensor) -> dict[str, Any]:
    """What torch's functions ask for where heads share keys; in a graph of unknown sizes no comparison."""
    return {"enable_gqa": True} if query_BTHD.shape[2] != key_BSKD.shape[2] else {}


def _fused(
    query_BTHD: Tensor,
    key_BSKD: Tensor,
    value_BSKD: Tensor,
    causal: bool,
    scoring: Scoring,
) -> Tensor:
    query_BHTD, key_BKSD, value_BKSD = map(
        for_kernel, first_derivatives_only("banded", query_BTHD, key_BSKD, value_BSKD)
    )
    output_BHTD = F.scaled_dot_product_attention(
        query_BHTD,
        key_BKSD,
        value_BKSD,
        is_causal=causal,
        scale=scoring.scale,
        dropout_p=scoring.dropout,
        **grouped(query_BTHD, key_BSKD),
    )
    return output_BHTD.transpose(1, 2)
