"""torch's FlexAttention, compiled, with block masks made from ranges instead of from a T x S mask.

Shapes: B batch, T queries, S keys, H query heads, K key-value heads, D head dimension, I blocks of queries,
J blocks of keys.
"""

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from ..window import LONGEST_REACH, PADDING, Bounds, Visibility, outside_inference_mode
from .capability import Capabilities

CAPABILITIES = Capabilities(
    purpose="torch's FlexAttention, compiled",
    devices=frozenset({"cuda"}),
    dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16}),
    head_dim_limit=256,
    head_dim_least=16,
    bidirectional=True,
    sinks=True,
    documents=True,
    separate_keys=True,
    more_keys=True,
    dropout=False,
    sink_logits=True,
    logit_cap=True,
    gradients=True,
)

BLOCK = 128
MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


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
    """Attention of the queries over their visible keys; returns [B, T, H, D]."""
    assert dropout == 0.0
    compute: Any = flex_attention if torch.compiler.is_compiling() else _compiled()
    result = compute(
        query_BTHD.transpose(1, 2),
        key_BSKD.transpose(1, 2),
        value_BSKD.transpose(1, 2),
        score_mod=None if logit_cap is None else _cap(torch.full((), logit_cap, device=query_BTHD.device)),
        block_mask=block_mask(visibility, query_BTHD, key_BSKD),
        scale=scale,
        enable_gqa=query_BTHD.shape[2] != key_BSKD.shape[2],
        return_lse=sink_logits is not None,
        # Its other kernel, for few queries, has no backward.
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
    )
    if sink_logits is None:
        output_BTHD: Tensor = result.transpose(1, 2)
        return output_BTHD
    output_BHTD: Tensor = result[0]
    normalizer_BHT: Tensor = result[1]
    # One more key of score s and no value leaves the share Z / (Z + exp(s)), where Z = exp(normalizer).
    share_BHT = torch.sigmoid(normalizer_BHT - sink_logits[:, None])
    return (output_BHTD * share_BHT[..., None].to(output_BHTD.dtype)).transpose(1, 2)


@cache
def _compiled() -> Any:
    """FlexAttention as a compiled function; uncompiled it would compute all T x S pairs."""
    return torch.compile(flex_attention)


def _cap(logit_cap: Tensor) -> Callable[..., Tensor]:
    def capped(score: Tensor, *place: Tensor) -> Tensor:
        return logit_cap * torch.tanh(score / logit_cap)

    return capped


def block_mask(visibility: Visibility, query_BTHD: Tensor, key_BSKD: Tensor) -> BlockMask:
    """The blocks that some query sees, and those that all of their queries see; made once a batch."""
    batch, queries, keys, device = (
        query_BTHD.shape[0],
        query_BTHD.shape[1],
        key_BSKD.shape[1],
        query_BTHD.device,
    )
    if visibility.documents is None and visibility.positions is None and not visibility.sinks:
        # The cache of Python stands outside compiled graphs.
        plain = _plain.__wrapped__ if torch.compiler.is_compiling() else _plain
        return plain(visibility.window, visibility.causal, queries, keys, device)
    return visibility.once(
        "flex",
        lambda: _make(visibility, batch, queries, keys, device),
        sizes=(batch, queries, keys, device) if visibility.documents is None else (),
    )


@lru_cache(maxsize=64)
def _plain(window: int | None, causal: bool, queries: int, keys: int, device: torch.device) -> BlockMask:
    """The mask of a shape without documents, which all batches share."""
    visibility = Visibility.build(window=window, causal=causal)
    return outside_inference_mode(lambda: _make(visibility, 1, queries, keys, device))


def _make(visibility: Visibility, batch: int, queries: int, keys: int, device: torch.device) -> BlockMask:
    sees = _sees(visibility, queries, keys, device)
    if not visibility.sinks and not visibility.separate_keys:
        return _of_bounds(visibility.bounds(queries, keys, device), keys, sees)
    rows = visibility.places(queries, keys, device).query_positions.shape[0]
    return create_block_mask(
        sees, rows if rows > 1 else None, None, queries, keys, device=device, BLOCK_SIZE=BLOCK
    )


def _sees(visibility: Visibility, queries: int, keys: int, device: torch.device) -> MaskFunction:
    """The definition for one query and key, which reads no more tensors than it must: each read is slow."""
    behind, ahead = (_on_device(LONGEST_REACH if side is None else side, device) for side in visibility.reach)
    shift = _on_device(keys - queries, device)
    separate, with_sinks = visibility.separate_keys, visibility.sinks > 0
    if visibility.documents is None and not separate and not with_sinks:

        def near(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
            distance = t + shift - s
            return (distance <= behind) & (distance >= -ahead)

        return near
    places = visibility.places(queries, keys, device)
    query_documents, key_documents = places.query_documents, places.key_documents
    no_later = _on_device(0 if visibility.causal else LONGEST_REACH, device)
    sinks = _on_device(min(visibility.sinks, LONGEST_REACH), device)
    last_row = _on_device(places.query_positions.shape[0] - 1, device)

    def sees(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        row = torch.minimum(b, last_row)
        if separate:
            distance = places.query_positions[row, t] - places.key_positions[row, s]
        else:
            distance = t + shift - s  # in one document positions advance by one a token
        visible = (distance <= behind) & (distance >= -ahead)
        if with_sinks:
            sink = (places.key_positions[row, s] < sinks) & (distance >= -no_later)
            visible = visible | sink
        if query_documents is not None and key_documents is not None:
            document = key_documents[row, s]
            visible = visible & (query_documents[row, t] == document) & (document != PADDING)
        return visible

    return sees


def _on_device(number: int, device: torch.device) -> Tensor:
    """A tensor, so that another window, direction or number of rows compiles nothing anew.

    Filled on the device: a copy from the host would wait for all work before it.
    """
    return torch.full((), number, device=device)


def _of_bounds(bounds: Bounds, keys: int, sees: MaskFunction) -> BlockMask:
    """A block mask from ranges: O(blocks of queries x blocks of keys), never O(T x S)."""
    queries = bounds.first_keys.shape[1]
    first_BIQ = _blocks(bounds.first_keys, keys)
    last_BIQ = _blocks(bounds.last_keys, -1)
    start_J = torch.arange(0, keys, BLOCK, device=first_BIQ.device)
    end_J = start_J + BLOCK - 1
    some_BIJ = (first_BIQ.amin(2)[..., None] <= end_J) & (last_BIQ.amax(2)[..., None] >= start_J)
    # Rows beyond the end see nothing, and must not keep their block from being whole.
    least_BI = _blocks(bounds.first_keys, 0).amax(2)
    most_BI = _blocks(bounds.last_keys, keys).amin(2)
    whole_BIJ = (least_BI[..., None] <= start_J) & (most_BI[..., None] >= end_J)
    whole_BIJ = whole_BIJ & (_blocks(bounds.last_queries, -1).amin(2) >= 0)[:, None, :]
    return BlockMask.from_kv_blocks(
        *_indices(some_BIJ & ~whole_BIJ),
        *_indices(whole_BIJ),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(queries, keys),
    )


def _blocks(values_BT: Tensor, beyond: int) -> Tensor:
    """The values in blocks of tokens, `beyond` where the last block has no token; [B, I, BLOCK]."""
    padded_BT = F.pad(values_BT, (0, -values_BT.shape[1] % BLOCK), value=beyond)
    return rearrange(padded_BT, "b (i q) -> b i q", q=BLOCK)


def _indices(chosen_BIJ: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, and which, the chosen ones first."""
    order_BIJ = chosen_BIJ.int().argsort(dim=2, descending=True, stable=True)
    return chosen_BIJ.sum(2)[:, None].int(), order_BIJ[:, None].int()
