"""Attention over the band alone: blocks of queries, each with the keys within its reach.

Time and memory grow with T x W, on any device; no T x S tensor is ever made. The ways, by what is visible:
full attention in one call; full attention document by document; blocks of queries with their band of keys,
behind the queries that see all before them in one call where a CPU gains by it; and, for keys in an order of
their own (caches), blocks of queries with all keys.

Shapes: B batch, T queries, S keys, H query heads, K key-value heads, D head dimension.
"""

import torch
from einops import rearrange
from torch import Tensor

from ..window import PADDING, Visibility
from . import banded_blocks, banded_matmul
from .capability import OLDEST_TORCH, Capabilities
from .scaled_dot_product import Scoring, scaled_dot_product

CAPABILITIES = Capabilities(
    purpose="any device; time and memory grow with T x W",
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

BLOCK = 128
WIDE = 2048


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
    queries, keys = query_BTHD.shape[1], key_BSKD.shape[1]
    if sink_logits is not None:
        # Once for all blocks, so that their gradients are not summed in low precision.
        sink_logits = sink_logits.to(torch.promote_types(sink_logits.dtype, torch.float32))
    scoring = Scoring(scale, dropout, sink_logits, logit_cap)
    if visibility.separate_keys or (visibility.covers(keys) and not scoring.fused):
        way = _over_all_keys
    elif not visibility.covers(keys):
        far_sinks = not visibility.causal and visibility.sinks > (visibility.window or 0)
        way = _over_all_keys if far_sinks else _over_bands
        if _mostly_full(query_BTHD, keys, visibility, scoring):
            way = _full_then_bands
    elif visibility.documents is not None:
        # The documents' lengths are not known inside a compiled graph, nor where there are no values.
        traced = torch.compiler.is_compiling() or visibility.documents.is_meta
        way = _over_all_keys if traced else _over_documents
    elif visibility.causal and 1 < queries < keys:
        way = _over_all_keys
    else:
        way = _in_one_call
    return way(query_BTHD, key_BSKD, value_BSKD, visibility, scoring)


def _mostly_full(query_BTHD: Tensor, keys: int, visibility: Visibility, scoring: Scoring) -> bool:
    window, queries = visibility.window, query_BTHD.shape[1]
    assert window is not None
    plain = visibility.causal and not visibility.sinks and visibility.documents is None
    plain = plain and not scoring.dropout and scoring.fused
    on_cpu = query_BTHD.device.type == "cpu"
    return on_cpu and plain and queries == keys and window >= WIDE and queries <= 2 * window


def _in_one_call(
    query_BTHD: Tensor,
    key_BSKD: Tensor,
    value_BSKD: Tensor,
    visibility: Visibility,
    scoring: Scoring,
) -> Tensor:
    causal = visibility.causal
    if (
        query_BTHD.shape[1] == 1
    ):  # and its keys may be many; a comparison alone would be a symbol to the compiler
        causal = False
    return scaled_dot_product(query_BTHD, key_BSKD, value_BSKD, None, causal, scoring)


def _over_documents(
    query_BTHD: Tensor,
    key_BSKD: Tensor,
    value_BSKD: Tensor,
    visibility: Visibility,
    scoring: Scoring,
) -> Tensor:
    batch = query_BTHD.shape[0]
    assert visibility.documents is not None
    documents_BT = visibility.documents.expand(batch, -1)
    tokens, lengths = visibility.once(
        "document lengths", lambda: _document_lengths(documents_BT), sizes=(batch,), any_window=True
    )
    if not lengths:
        return _over_all_keys(query_BTHD, key_BSKD, value_BSKD, visibility, scoring)
    outputs = [
        scaled_dot_product(query, key, value, None, visibility.causal, scoring)
        for query, key, value in zip(
            *(
                torch.split_with_sizes(rearrange(tensor, "b t h d -> 1 (b t) h d")[:, tokens], lengths, dim=1)
                for tensor in (query_BTHD, key_BSKD, value_BSKD)
            ),
            strict=True,
        )
    ]
    output = torch.cat(outputs, dim=1)[0]
    padded = output.new_zeros(documents_BT.numel(), *output.shape[1:]).index_copy(0, tokens, output)
    return padded.view_as(query_BTHD)


def _document_lengths(documents_BT: Tensor) -> tuple[Tensor, list[int]]:
    """Indices of the tokens in the flattened batch, padding left out, and their count in each document."""
    row_B1 = torch.arange(documents_BT.shape[0], device=documents_BT.device)[:, None]
    tokens = (documents_BT != PADDING).flatten().nonzero()[:, 0]
    name = (row_B1 * (documents_BT.max() + 1) + documents_BT).flatten()[tokens]
    ends = (name.diff(append=name.new_full((1,), PADDING)) != 0).nonzero()[:, 0] + 1
    return tokens, ends.diff(prepend=ends.new_zeros(1)).tolist()


def _over_bands(
    query_BTHD: Tensor,
    key_BSKD: Tensor,
    value_BSKD: Tensor,
    visibility: Visibility,
    scoring: Scoring,
) -> Tensor:
    # Which blocks need a mask of their own is not known inside a compiled graph.
    traced_documents = torch.compiler.is_compiling() and visibility.documents is not None
    placed = visibility.documents is not None or visibility.positions is not None
    in_place = query_BTHD.device.type == "cpu" and not (traced_documents or (visibility.sinks and placed))
    attend = banded_matmul.attend if in_place and scoring.fused else banded_blocks.attend
    return attend(query_BTHD, key_BSKD, value_BSKD, visibility, scoring)


def _full_then_bands(
    query_BTHD: Tensor,
    key_BSKD: Tensor,
    value_BSKD: Tensor,
    visibility: Visibility,
    scoring: Scoring,
) -> Tensor:
    """The queries that see all before them go to torch's attention, faster than long bands on a CPU."""
    window = visibility.window
    assert window is not None
    first_BTHD = _in_one_call(
        query_BTHD[:, :window], key_BSKD[:, :window], value_BSKD[:, :window], visibility, scoring
    )
    rest_BTHD = _over_bands(query_BTHD[:, window:], key_BSKD, value_BSKD, visibility, scoring)
    return torch.cat([first_BTHD, rest_BTHD], dim=1)


def _over_all_keys(
    query_BTHD: Tensor,
    key_BSKD: Tensor,
    value_BSKD: Tensor,
    visibility: Visibility,
    scoring: Scoring,
) -> Tensor:
    places = visibility.places(query_BTHD.shape[1], key_BSKD.shape[1], query_BTHD.device)
    outputs: list[Tensor] = []
    for start in range(0, query_BTHD.shape[1], BLOCK):
        block = slice(start, start + BLOCK)
        documents = None if places.query_documents is None else places.query_documents[:, block]
        visible = visibility.between(
            places._replace(query_positions=places.query_positions[:, block], query_documents=documents)
        )[:, None]
        blind = ~visible.any(-1, keepdim=True)
        output = scaled_dot_product(
            query_BTHD[:, block], key_BSKD, value_BSKD, visible | blind, False, scoring
        )
        outputs.append(output.masked_fill(rearrange(blind, "b 1 q 1 -> b q 1 1"), 0.0))
    return torch.cat(outputs, dim=1)
