"""torch's fused attention in this package's layout.

Shapes: B batch, T queries, S keys, H query heads, K key-value heads, D head dimension.
"""

import torch.nn.functional as F
from torch import Tensor


def scaled_dot_product(
    query_BTHD: Tensor,
    key_BSKD: Tensor,
    value_BSKD: Tensor,
    allowed_B1TS: Tensor | None,
    causal: bool,
    scale: float,
    dropout: float,
) -> Tensor:
    """Attention [B, T, H, D] over allowed keys (bool; every query needs one), without repeating key heads."""
    output_BHTD = F.scaled_dot_product_attention(
        query_BTHD.transpose(1, 2),
        key_BSKD.transpose(1, 2),
        value_BSKD.transpose(1, 2),
        attn_mask=allowed_B1TS,
        is_causal=causal,
        scale=scale,
        dropout_p=dropout,
        enable_gqa=query_BTHD.shape[2] != key_BSKD.shape[2],
    )
    return output_BHTD.transpose(1, 2)
