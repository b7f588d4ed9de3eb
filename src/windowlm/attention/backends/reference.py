"""The oracle: attention written as its definition, with the whole T x S matrix of weights.

Shapes: B batch, T queries, S keys, K key-value heads, G query heads a key-value head, D head dimension.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..window import Visibility
from .autocast import without_autocast
from .capability import OLDEST_TORCH, Capabilities

CAPABILITIES = Capabilities(
    purpose="the oracle; memory grows with T x S",
    dtypes=frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16}),
    bidirectional=True,
    sinks=True,
    documents=True,
    separate_keys=True,
    more_keys=True,
    dropout=True,
    sink_logits=True,
    logit_cap=True,
    gradients=True,
    torch_versions=(OLDEST_TORCH, None),
)


def attend(
    query_BTHD: Tensor,
    key_BSKD: Tensor,
    value_BSKD: Tensor,
    visibility: Visibility,
    *,
    scale: float,
    dropout: float,
    sink_logits: Tensor | None = None,
    logit_cap: float | None = None,
) -> Tensor:
    """Softmax attention in float32, or in float64 where the query has it; returns [B, T, H, D]."""
    dtype = torch.promote_types(query_BTHD.dtype, torch.float32)
    query = rearrange(query_BTHD, "b t (k g) d -> b k g t d", k=key_BSKD.shape[2]).to(dtype)
    key, value = (rearrange(tensor, "b s k d -> b k 1 s d").to(dtype) for tensor in (key_BSKD, value_BSKD))
    visible = visibility.mask(query_BTHD.shape[1], key_BSKD.shape[1], query_BTHD.device)[:, None, None]
    with without_autocast(query_BTHD.device):
        scores = query @ key.mT * scale
        if logit_cap is not None:
            scores = logit_cap * torch.tanh(scores / logit_cap)
        scores = scores.masked_fill(~visible, -torch.inf)
        if sink_logits is not None:
            column = rearrange(sink_logits.to(dtype), "(k g) -> 1 k g 1 1", k=key.shape[1])
            scores = torch.cat([scores, column.expand(*scores.shape[:-1], 1)], dim=-1)
        weights = scores.softmax(-1)[..., : key.shape[-2]].masked_fill(~visible, 0.0)
        output = F.dropout(weights, dropout) @ value
    return rearrange(output, "b k g t d -> b t (k g) d").to(query_BTHD.dtype)
