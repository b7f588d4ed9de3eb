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
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ..document_layout import PADDING
from ..window import LONGEST_REACH, Bounds, Places, Visibility, outside_inference_mode
from .capability import Capabilities
from .readable_heads import aligned
from .scaled_dot_product import grouped

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
        # Each other way to lie in memory is compiled anew.
        *(aligned(tensor).transpose(1, 2) for tensor in (query_BTHD, key_BSKD, value_BSKD)),
        score_mod=None if logit_cap is None else _cap(torch.full((), logit_cap, device=query_BTHD.device)),
        block_mask=block_mask(visibility, query_BTHD, key_BSKD),
        scale=scale,
        **grouped(query_BTHD, key_BSKD),
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
    if visibility.separate_keys:
        some_BIJ, whole_BIJ = _by_places(visibility, _in_rows(visibility.places(queries, keys, device)))
    else:
        some_BIJ, whole_BIJ = _by_bounds(visibility.bounds(queries, keys, device), keys)
        if visibility.sinks:
            of_sinks_BIJ = _by_sinks(*visibility.sink_ranges(queries, keys, device), keys, visibility.sinks)
            some_BIJ = some_BIJ | of_sinks_BIJ
            # The kernel finds a row of either by the rows of the former.
            whole_BIJ = whole_BIJ.expand_as(some_BIJ)
    return BlockMask.from_kv_blocks(
        *_indices(some_BIJ & ~whole_BIJ),
        *_indices(whole_BIJ),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(queries, keys),
    )


def _in_rows(places: Places) -> Places:
    """The same, each with as many rows as the one of most."""
    rows = max(len(tensor) for tensor in places if tensor is not None)

    def in_rows(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.expand(rows, -1)

    return Places(
        places.query_positions.expand(rows, -1),
        places.key_positions.expand(rows, -1),
        in_rows(places.query_documents),
        in_rows(places.key_documents),
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
    places = _in_rows(visibility.places(queries, keys, device))
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
            position = places.key_positions[row, s]
            visible = visible | ((position >= 0) & (position < sinks) & (distance >= -no_later))
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


def _by_bounds(bounds: Bounds, keys: int) -> tuple[Tensor, Tensor]:
    """Which blocks of keys some, and which all, of a block of queries see in the window, [B, I, J]."""
    first_BIQ = _blocks(bounds.first_keys, keys)
    last_BIQ = _blocks(bounds.last_keys, -1)
    start_J = torch.arange(0, keys, BLOCK, device=first_BIQ.device)
    end_J = start_J + BLOCK - 1
    some_BIJ = (first_BIQ.amin(2)[..., None] <= end_J) & (last_BIQ.amax(2)[..., None] >= start_J)
    # Rows beyond the end see nothing, and must not keep their block from being whole.
    least_BI = _blocks(bounds.first_keys, 0).amax(2)
    most_BI = _blocks(bounds.last_keys, keys).amin(2)
    whole_BIJ = (least_BI[..., None] <= start_J) & (most_BI[..., None] >= end_J)
    return some_BIJ, whole_BIJ & (_blocks(bounds.last_queries, -1).amin(2) >= 0)[:, None, :]


def _by_sinks(first_BT: Tensor, last_BT: Tensor, keys: int, sinks: int) -> Tensor:
    """Which blocks hold sinks that some of a block of queries see, [B, I, J]."""
    first_BIQ, last_BIQ = _blocks(first_BT // BLOCK, keys), _blocks(last_BT // BLOCK, -1)
    count = -(-keys // BLOCK)
    seen_BIJ = first_BIQ.new_zeros((*first_BIQ.shape[:2], count), dtype=torch.int32)
    for further in range(min(-(-sinks // BLOCK) + 1, count)):
        block_BIQ = first_BIQ + further
        seen_BIQ = (block_BIQ <= last_BIQ).int()
        seen_BIJ.scatter_add_(2, block_BIQ.clamp(max=count - 1), seen_BIQ)
    return seen_BIJ > 0


def _by_places(visibility: Visibility, places: Places) -> tuple[Tensor, Tensor]:
    """Which blocks of keys in any order some of a block of queries may, and which all of them do see.

    By the least and the greatest position and document in each block, so that some of which none is seen may
    be among the former; the mask function hides them.
    """
    least_BI1, most_BI1, least_B1J, most_B1J = (
        extreme
        for blocks, axis in (
            (_blocks_in_range(places.query_positions), 2),
            (_blocks_in_range(places.key_positions), 1),
        )
        for extreme in (blocks.amin(2).unsqueeze(axis), blocks.amax(2).unsqueeze(axis))
    )
    behind, ahead = (LONGEST_REACH if side is None else side for side in visibility.reach)
    nearest_BIJ, farthest_BIJ = least_BI1 - most_B1J, most_BI1 - least_B1J
    some_BIJ = (farthest_BIJ >= -ahead) & (nearest_BIJ <= behind)
    if visibility.sinks:
        earlier_BIJ = farthest_BIJ >= (0 if visibility.causal else -LONGEST_REACH)
        some_BIJ = some_BIJ | (earlier_BIJ & (least_B1J < min(visibility.sinks, LONGEST_REACH)))
    whole_BIJ = (nearest_BIJ >= -ahead) & (farthest_BIJ <= behind)
    keys = places.key_positions.shape[1]
    whole_BIJ = whole_BIJ & (torch.arange(0, keys, BLOCK, device=whole_BIJ.device) + BLOCK <= keys)
    if places.query_documents is None or places.key_documents is None:
        return some_BIJ, whole_BIJ
    query_BIQ, key_BJS = _blocks_in_range(places.query_documents), _blocks_in_range(places.key_documents)
    least_BI1, most_BI1 = query_BIQ.amin(2)[..., None], query_BIQ.amax(2)[..., None]
    least_B1J, most_B1J = key_BJS.amin(2)[:, None], key_BJS.amax(2)[:, None]
    some_BIJ = some_BIJ & (least_BI1 <= most_B1J) & (least_B1J <= most_BI1) & (most_B1J != PADDING)
    same_BIJ = (least_BI1 == most_BI1) & (least_B1J == most_B1J) & (least_BI1 == least_B1J)
    return some_BIJ, whole_BIJ & same_BIJ & (least_BI1 != PADDING)


def _blocks_in_range(values_BT: Tensor) -> Tensor:
    """The values in blocks, the last block filled with the last value."""
    filling_BT = values_BT[:, -1:].expand(-1, -values_BT.shape[1] % BLOCK)
    return rearrange(torch.cat([values_BT, filling_BT], 1), "b (i q) -> b i q", q=BLOCK)


def _blocks(values_BT: Tensor, beyond: int) -> Tensor:
    """The values in blocks of tokens, `beyond` where the last block has no token; [B, I, BLOCK]."""
    padded_BT = F.pad(values_BT, (0, -values_BT.shape[1] % BLOCK), value=beyond)
    return rearrange(padded_BT, "b (i q) -> b i q", q=BLOCK)


def _indices(chosen_BIJ: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, and which, the chosen ones first."""
    order_BIJ = chosen_BIJ.int().argsort(dim=2, descending=True, stable=True)
    return chosen_BIJ.sum(2)[:, None].int(), order_BIJ[:, None].int()
