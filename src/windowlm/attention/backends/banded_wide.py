"""The CPU's way over wide windows and full attention: torch's fused attention forward, our tiles backward.

The first queries see all before them, and may be all; the others go to torch's kernel in blocks, each with
the keys in its reach and a mask that all blocks share. Where the first are all, and few, torch's kernel
computes the gradients too. The two operators are opaque to torch.compile.
`blockwise` computes the same by formula.

Shapes: B batch, T queries (as many keys), Q queries of a block, L keys in its reach, H query heads,
K key-value heads, D head dimension.
"""

from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..differentiable import Computation, differentiable
from ..operator import empty_contiguous_gradients
from ..window import Visibility, reach, within_window
from . import banded_tiles
from .autocast import without_autocast
from .banded_threads import Share, heads_are_even, holds_nan, in_parallel, shares_of, use_threads
from .scaled_dot_product import for_kernel, widened, with_exact_scale

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Queries of a block: enough for torch's kernel to take larger tiles.
BLOCK = 256
# From here on one causal call is faster than blocks, though it computes 256 keys beyond those that are seen.
LONG = 768
# Up to here torch's kernel is faster backward too, where no window hides anything; further where its heads,
# each of which has one thread, are shared evenly. Of some hundred queries it takes so many at a time.
SHORT, SHORT_OF_EVEN_HEADS = 192, 1152
QUERIES_AT_A_TIME = 64
VECTOR = 16


def attend(
    query_BTHD: Tensor, key_BTKD: Tensor, value_BTKD: Tensor, visibility: Visibility, scale: float
) -> Tensor:
    """Causal attention over the window, without documents or sinks; returns [B, T, H, D]."""
    tokens, dtype = query_BTHD.shape[1], query_BTHD.dtype
    window = tokens if visibility.window is None else min(visibility.window, tokens)
    with without_autocast(query_BTHD.device):
        query, key, value = widened(query_BTHD, key_BTKD, value_BTKD)
        query, scale = with_exact_scale(query, scale)
        bias_QL = query.new_empty(0, 0)
        if window < tokens:
            bias_QL = visibility.once(
                "banded wide", lambda: _bias(window, bias_QL.dtype), sizes=(window, bias_QL.dtype)
            )
        output_BTHD = _attention(query, key, value, bias_QL, window, scale)
    return output_BTHD.to(dtype)


def _bias(window: int, dtype: torch.dtype) -> Tensor:
    """What is added to the scores of a block and the keys up to its last: 0 where visible, -inf elsewhere."""
    behind = reach(window, causal=True)[0] + VECTOR
    index_L = torch.arange(behind + BLOCK, device="cpu")
    distance_QL = index_L[:BLOCK, None] + behind - index_L
    hidden_QL = ~within_window(distance_QL, window, causal=True)
    return torch.zeros(hidden_QL.shape, dtype=dtype, device="cpu").masked_fill(hidden_QL, -torch.inf)


_bias_of_full = cache(lambda dtype: _bias(LONG, dtype))


def _blocks(window: int, tokens: int) -> Iterator[tuple[slice, slice]]:
    """The queries of each call of torch's kernel, and their keys; the first see all up to their own."""
    # Whole blocks behind the window, as its tiles are smaller in small ones.
    first = tokens - -(-(tokens - window) // BLOCK) * BLOCK
    if window < tokens and first < LONG:
        first = min(window, BLOCK)
    yield slice(0, first), slice(0, first)
    behind, _ = reach(window, causal=True)
    for start in range(first, tokens, BLOCK):
        stop = min(start + BLOCK, tokens)
        in_reach = min(start, behind) + stop - start
        yield slice(start, stop), slice(max(0, stop - in_reach - -in_reach % VECTOR), stop)


def _attend(
    query_BTHD: Tensor, key_BTKD: Tensor, value_BTKD: Tensor, bias_QL: Tensor, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Outputs, and the softmax's denominators as logarithms, [B, T, H]."""
    blocks = list(_blocks(window, query_BTHD.shape[1]))
    if len(blocks) == 1:
        use_threads()
        return _by_kernel(query_BTHD, key_BTKD, value_BTKD, None, scale)
    if not len(bias_QL):
        bias_QL = _bias_of_full(query_BTHD.dtype)
    output_BTHD = query_BTHD.new_empty(query_BTHD.shape)
    normalizer_BTH = query_BTHD.new_empty(query_BTHD.shape[:3])
    shown = bias_QL.shape[1] - BLOCK

    def fill(rows: slice, heads: slice, kv_heads: slice) -> None:
        own, of_keys = (rows, slice(None), heads), (rows, slice(None), kv_heads)
        query_BTGD, key_BTGD, value_BTGD = query_BTHD[own], key_BTKD[of_keys], value_BTKD[of_keys]
        output_BTGD, normalizer_BTG = output_BTHD[own], normalizer_BTH[own]
        for compute in (_by_kernel, _by_kernel_without_overflow):
            for queries, keys in blocks:
                before, count = queries.start - keys.start, queries.stop - queries.start
                output_BTGD[:, queries], normalizer_BTG[:, queries] = compute(
                    query_BTGD[:, queries],
                    key_BTGD[:, keys],
                    value_BTGD[:, keys],
                    bias_QL[:count, shown - before : shown + count] if queries.start else None,
                    scale,
                )
            if not output_BTGD.sum().isnan():
                break

    def fill_share(share: Share) -> None:
        fill(slice(share.row, share.row + 1), share.heads, share.kv_heads)

    if heads_are_even(key_BTKD):
        in_parallel(fill_share, shares_of(query_BTHD, key_BTKD, divisible=False))
    else:
        # Torch's kernel shares queries among its threads, too.
        use_threads()
        fill(*[slice(None)] * 3)
    return output_BTHD, normalizer_BTH


def _by_kernel(
    query_BQHD: Tensor, key_BLKD: Tensor, value_BLKD: Tensor, bias_QL: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and normalizer of some queries, [B, Q, H, D] and [B, Q, H]; causal where there is no mask."""
    output_BHQD, normalizer_BHQ = _forward(
        *map(for_kernel, (query_BQHD, key_BLKD, value_BLKD)),
        0.0,
        bias_QL is None,
        attn_mask=bias_QL,
        scale=scale,
    )
    # As they lie in memory already.
    return output_BHQD.transpose(1, 2).contiguous(), normalizer_BHQ.transpose(1, 2).contiguous()


def _by_kernel_without_overflow(
    query_BQHD: Tensor, key_BLKD: Tensor, value_BLKD: Tensor, bias_QL: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The same bit by bit, also where the product with a hidden key overflows, which plus -inf is NaN.

    Once for each set of large keys that some queries see, with zeros for the large keys that they do not.
    """
    if bias_QL is None:
        return _by_kernel(query_BQHD, key_BLKD, value_BLKD, None, scale)
    size_L = key_BLKD.double().abs().amax((0, 2, 3)) * query_BQHD.double().abs().max() * query_BQHD.shape[3]
    large_L = size_L >= torch.finfo(query_BQHD.dtype).max
    seen_QL = (bias_QL == 0) & large_L
    output_BQHD, normalizer_BQH = torch.empty_like(query_BQHD), query_BQHD.new_empty(query_BQHD.shape[:3])
    for seen_L in torch.unique(seen_QL, dim=0):
        rows_Q = (seen_QL == seen_L).all(1)
        known_BLKD = key_BLKD.masked_fill((large_L & ~seen_L)[:, None, None], 0.0)
        output, normalizer = _by_kernel(query_BQHD, known_BLKD, value_BLKD, bias_QL, scale)
        output_BQHD[:, rows_Q], normalizer_BQH[:, rows_Q] = output[:, rows_Q], normalizer[:, rows_Q]
    return output_BQHD, normalizer_BQH


def _attend_backward(
    gradient_BTHD: Tensor,
    query_BTHD: Tensor,
    key_BTKD: Tensor,
    value_BTKD: Tensor,
    _: Tensor,
    window: int,
    scale: float,
    output_BTHD: Tensor,
    normalizer_BTH: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = gradient_BTHD, query_BTHD, key_BTKD, value_BTKD, output_BTHD, normalizer_BTH
    tokens = query_BTHD.shape[1]
    short = SHORT_OF_EVEN_HEADS if heads_are_even(key_BTKD) else SHORT
    if tokens <= min(short, window):
        query_gradient, key_gradient, value_gradient = _gradients_by_kernel(*inputs, scale)
    else:
        query_gradient, key_gradient, value_gradient = banded_tiles.gradients(*inputs, window, scale)
    if holds_nan(query_gradient):
        return banded_tiles.gradients(*inputs, window, scale, exact=True)
    return query_gradient, key_gradient, value_gradient


def _gradients_by_kernel(
    gradient_BTHD: Tensor,
    query_BTHD: Tensor,
    key_BTKD: Tensor,
    value_BTKD: Tensor,
    output_BTHD: Tensor,
    normalizer_BTH: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value by torch's kernel where each query sees all keys up to its own.

    Some queries at a time, the last first, as these give each key the least weight, and a sum that begins
    small rounds less.
    """
    tokens = query_BTHD.shape[1]
    blocks = -(-tokens // BLOCK)
    cuts = [tokens * block // blocks for block in range(blocks + 1)]
    cuts = [min(tokens, cut + -cut % QUERIES_AT_A_TIME) for cut in cuts]
    query_gradient, key_gradient, value_gradient = (
        torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        for tensor in (query_BTHD, key_BTKD, value_BTKD)
    )
    for start, stop in reversed(list(pairwise(cuts))):
        queries = slice(start, stop)
        gradient_BHQD, query_BHQD, output_BHQD = (
            for_kernel(tensor[:, queries]) for tensor in (gradient_BTHD, query_BTHD, output_BTHD)
        )
        for keys in (queries, slice(0, start)):
            if keys.start == keys.stop:
                continue
            of_query, of_key, of_value = _backward(
                gradient_BHQD,
                query_BHQD,
                *(for_kernel(tensor[:, keys]) for tensor in (key_BTKD, value_BTKD)),
                output_BHQD,
                normalizer_BTH[:, queries].transpose(1, 2),
                0.0,
                keys == queries,
                scale=scale,
            )
            for total, added, own, begun in (
                (query_gradient, of_query, queries, keys != queries),
                (key_gradient, of_key, keys, stop < tokens),
                (value_gradient, of_value, keys, stop < tokens),
            ):
                own_BTHD = total[:, own]
                write = own_BTHD.add_ if begun else own_BTHD.copy_
                write(added.transpose(1, 2))
    return query_gradient, key_gradient, value_gradient


def _empty_outputs(query_BTHD: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return query_BTHD.new_empty(query_BTHD.shape), query_BTHD.new_empty(query_BTHD.shape[:3])


_ARGUMENTS = "Tensor query, Tensor key, Tensor value, Tensor bias, SymInt window, float scale"
_attention = differentiable(
    "banded",
    __name__,
    _ARGUMENTS,
    Computation(_attend, _empty_outputs),
    Computation(_attend_backward, empty_contiguous_gradients),
    keeps_outputs=True,
)
