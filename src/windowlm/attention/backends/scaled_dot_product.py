"""torch's fused attention in this package's layout, and its formula for what fused kernels lack.

Shapes: B batch, T queries, S keys, H query heads, K key-value heads, D head dimension.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .autocast import without_autocast


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
    allowed_B1TS: Tensor | None,
    causal: bool,
    scoring: Scoring,
) -> Tensor:
    """Attention [B, T, H, D] over allowed keys (bool; every query needs one), without repeating key heads."""
    if not scoring.fused:
        assert allowed_B1TS is not None
        return _by_formula(query_BTHD, key_BSKD, value_BSKD, allowed_B1TS, scoring)
    dtype = query_BTHD.dtype
    if query_BTHD.device.type == "cpu" and dtype in (torch.bfloat16, torch.float16):
        # torch's CPU kernels take up to seven times as long in float16, and lose half the digits of dq where
        # one weight is near 1: their backward pass starts from the rounded output.
        with torch.autocast("cpu", enabled=False):
            query, key, value = (tensor.float() for tensor in (query_BTHD, key_BSKD, value_BSKD))
            return scaled_dot_product(query, key, value, allowed_B1TS, causal, scoring).to(dtype)
    output_BHTD = F.scaled_dot_product_attention(
        query_BTHD.transpose(1, 2),
        key_BSKD.transpose(1, 2),
        value_BSKD.transpose(1, 2),
        attn_mask=allowed_B1TS,
        is_causal=causal,
        scale=scoring.scale,
        dropout_p=scoring.dropout,
        enable_gqa=query_BTHD.shape[2] != key_BSKD.shape[2],
    )
    return output_BHTD.transpose(1, 2)


def _by_formula(
    query_BTHD: Tensor, key_BSKD: Tensor, value_BSKD: Tensor, allowed_B1TS: Tensor, scoring: Scoring
) -> Tensor:
    kv_heads, dtype = key_BSKD.shape[2], torch.promote_types(query_BTHD.dtype, torch.float32)
    with without_autocast(query_BTHD.device):
        query = rearrange(query_BTHD, "b t (k g) d -> b k (g t) d", k=kv_heads).to(dtype)
        key, value = (rearrange(tensor, "b s k d -> b k s d").to(dtype) for tensor in (key_BSKD, value_BSKD))
        scores = query @ key.mT * scoring.scale
        if scoring.logit_cap is not None:
            scores = scoring.logit_cap * torch.tanh(scores / scoring.logit_cap)
        scores = rearrange(scores, "b k (g t) s -> b (k g) t s", t=query_BTHD.shape[1])
        scores = scores.masked_fill(~allowed_B1TS, -torch.inf)
        largest = scores.amax(-1, keepdim=True).detach()
        if scoring.sink_logits is not None:
            sink_H11 = scoring.sink_logits.to(dtype)[:, None, None]
            largest = torch.maximum(largest, sink_H11.detach())
        weights = (scores - largest).exp()
        total = weights.sum(-1, keepdim=True)
        if scoring.sink_logits is not None:
            total = total + (sink_H11 - largest).exp()
        weights = F.dropout(weights / total, scoring.dropout)
        weights = rearrange(weights, "b (k g) t s -> b k (g t) s", k=kv_heads)
        mixed = rearrange(weights @ value, "b k (g t) d -> b t (k g) d", t=query_BTHD.shape[1])
    return mixed.to(query_BTHD.dtype)
