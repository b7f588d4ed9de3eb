"""Attention over the band alone: blocks of queries, each with the keys within its reach.

Time and memory grow with T x W, on any device; no T x S tensor is ever made. The ways, by what is visible:
full attention in one call; full attention document by document; blocks of queries with their band of keys;
and, for keys in an order of their own (caches), blocks of queries with all keys.

Shapes: B batch, T queries, S keys, H query heads, K key-value heads, D head dimension.
"""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

from ..document_layout import PADDING
from ..window import Visibility
from . import banded_blocks, banded_matmul, banded_wide, blockwise
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

# From this window on a CPU is faster by tiles of queries and keys, and up to so many tokens, whose blocks are
# too few to outweigh their calls.
WIDE, FEW_TOKENS = 768, 640
# Of torch's kernels on a GPU for heads that share keys.
LARGEST_HEAD_SHARING = 256
Way = Callable[[Tensor, Tensor, Tensor, Visibility, Scoring], Tensor]


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
        # Its gradient is summed over blocks, and rounded once.
        sink_logits = sink_logits.to(torch.promote_types(sink_logits.dtype, torch.float32))
    scoring = Scoring(scale, dropout, sink_logits, logit_cap)
    way: Way
    if visibility.separate_keys:
        way = blockwise.attend
    elif not visibility.covers(keys):
        far_sinks = not visibility.causal and visibility.sinks > (visibility.window or 0)
        way = blockwise.attend if far_sinks else _over_bands
    elif visibility.documents is not None:
        # The documents' lengths are not known inside a compiled graph, nor where there are no values.
        traced = torch.compiler.is_compiling() or visibility.documents.is_meta
        way = blockwise.attend if traced else _over_documents
    elif visibility.causal and 1 < queries < keys:
        way = blockwise.attend
    else:
        way = _in_one_call
    return way(query_BTHD, key_BSKD, value_BSKD, visibility, scoring)


def _in_one_call(
    query_BTHD: Tensor,
    key_BSKD: Tensor,
    value_BSKD: Tensor,
    visibility: Visibility,
    scoring: Scoring,
) -> Tensor:
    """Attention in which every query sees all keys, or all up to its own."""
    on_cpu, causal = query_BTHD.device.type == "cpu", visibility.causal
    has_kernel = not scoring.dropout if on_cpu else _fused_on_gpu(query_BTHD, key_BSKD)
    if not (scoring.fused and has_kernel):
        return blockwise.attend(query_BTHD, key_BSKD, value_BSKD, visibility, scoring)
    if query_BTHD.shape[1] == 1:
        # Its keys may be many; a comparison alone would be a symbol to the compiler.
        causal = False
    if on_cpu and causal:
        return banded_wide.attend(query_BTHD, key_BSKD, value_BSKD, visibility, scoring.scale)
    return scaled_dot_product(query_BTHD, key_BSKD, value_BSKD, causal, scoring)


def _fused_on_gpu(query_BTHD: Tensor, key_BSKD: Tensor) -> bool:
    """Whether a GPU has a kernel for the call; elsewhere torch makes the whole matrix of weights.

    Where heads share keys there is one in half precision alone, up to a head dimension of 256.
    """
    shares = query_BTHD.shape[2] != key_BSKD.shape[2]
    if query_BTHD.dtype == torch.float32 or query_BTHD.shape[3] > LARGEST_HEAD_SHARING:
        return not shares
    return query_BTHD.dtype != torch.float64


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
        return blockwise.attend(query_BTHD, key_BSKD, value_BSKD, visibility, scoring)
    whole = Visibility(None, visibility.causal)
    outputs = [
        _in_one_call(query, key, value, whole, scoring)
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
    placed = visibility.documents is not None or visibility.positions is not None
    sinks_anywhere = placed and visibility.sinks > 0
    on_cpu = query_BTHD.device.type == "cpu"
    if on_cpu and scoring.fused and not sinks_anywhere:
        if _wide(query_BTHD, key_BSKD, visibility, scoring):
            return banded_wide.attend(query_BTHD, key_BSKD, value_BSKD, visibility, scoring.scale)
        # Which blocks need a mask of their own is not known inside a compiled graph.
        if visibility.documents is None or not torch.compiler.is_compiling():
            return banded_matmul.attend(query_BTHD, key_BSKD, value_BSKD, visibility, scoring)
    if not visibility.sinks:
        return blockwise.attend(query_BTHD, key_BSKD, value_BSKD, visibility, scoring)
    return banded_blocks.attend(query_BTHD, key_BSKD, value_BSKD, visibility, scoring)


def _wide(query_BTHD: Tensor, key_BSKD: Tensor, visibility: Visibility, scoring: Scoring) -> bool:
    window, queries = visibility.window, query_BTHD.shape[1]
    assert window is not None
    plain = visibility.causal and not visibility.sinks and visibility.documents is None
    plain = plain and not scoring.dropout and queries == key_BSKD.shape[1]
    return plain and (window >= WIDE or queries <= max(2 * window, FEW_TOKENS))
