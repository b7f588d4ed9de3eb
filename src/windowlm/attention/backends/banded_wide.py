"""The CPU's way over wide windows and full attention: torch's kernel forward, our tiles or it backward.

The first queries see all before them, and may be all; the others go to torch's kernel in blocks, each with
the keys in its reach and a mask that all blocks share. Of short sequences torch's kernel computes the
gradients too. The two operators are opaque to torch.compile.
`blockwise` computes the same by formula.

Shapes: B batch, T queries (as many keys), Q queries of a block, L keys in its reach, H query heads,
K key-value heads, D head dimension.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..differentiable import Computation, differentiable
from ..operator import empty_contiguous_gradients
from ..window import Visibility, reach, within_window
from . import banded_tiles
from .autocast import without_autocast
from .banded_threads import heads_are_even, holds_nan, in_parallel, shares_of, use_threads
from .scaled_dot_product import for_kernel, widened, with_exact_scale

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Queries of a block: enough for torch's kernel to take larger tiles.
BLOCK = 256
# From here on one causal call is faster than blocks, though it computes 256 keys beyond those that are seen.
LONG = 768
# Up to here one call with torch's own threads is fastest in both passes, where no window hides anything.
SHORT = 192
# Up to here torch's kernel is faster than tiles backward too, where threads share the heads evenly and the
# window is no shorter than a block. Of some hundred queries it takes so many at a time.
SHORT_BACKWARD, QUERIES_AT_A_TIME = 832, 64
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
    tokens = query_BTHD.shape[1]
    blocks, even = list(_blocks(window, tokens)), heads_are_even(key_BTKD)
    if len(blocks) == 1 and not (even and tokens > SHORT):
        use_threads()
        return _by_kernel(query_BTHD, key_BTKD, value_BTKD, None, scale)
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
            # Without a mask nothing is added to what overflows.
            if len(blocks) == 1 or not output_BTGD.sum().isnan():
                break

    if even:
        _in_shares(fill, query_BTHD, key_BTKD)
    else:
        # Torch's kernel shares queries among its threads, too.
        use_threads()
        fill(*[slice(None)] * 3)
    return output_BTHD, normalizer_BTH


def _in_shares(fill: Callable[[slice, slice, slice], None], query_BTHD: Tensor, key_BTKD: Tensor) -> None:
    """Call it by each thread with a row of the batch, query heads and key-value heads."""
    in_parallel(
        lambda share: fill(slice(share.row, share.row + 1), share.heads, share.kv_heads),
        shares_of(query_BTHD, key_BTKD, divisible=False),
    )


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
    bias_QL: Tensor,
    window: int,
    scale: float,
    output_BTHD: Tensor,
    normalizer_BTH: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens = query_BTHD.shape[1]
    inputs = gradient_BTHD, query_BTHD, key_BTKD, value_BTKD, output_BTHD, normalizer_BTH
    all_at_once = tokens <= min(SHORT, window)
    by_heads = tokens <= SHORT_BACKWARD and min(tokens, BLOCK) <= window and heads_are_even(key_BTKD)
    if all_at_once or by_heads:
        query_gradient, key_gradient, value_gradient = (
            torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            for tensor in (query_BTHD, key_BTKD, value_BTKD)
        )

        def fill(rows: slice, heads: slice, kv_heads: slice) -> None:
            own, of_keys = (rows, slice(None), heads), (rows, slice(None), kv_heads)
            _fill_by_kernel(
                [tensor[own] for tensor in (gradient_BTHD, query_BTHD, output_BTHD, normalizer_BTH)],
                [tensor[of_keys] for tensor in (key_BTKD, value_BTKD)],
                query_gradient[own],
                [tensor[of_keys] for tensor in (key_gradient, value_gradient)],
                bias_QL,
                window,
                scale,
            )

        if all_at_once:
            fill(*[slice(None)] * 3)
        else:
            _in_shares(fill, query_BTHD, key_BTKD)
    else:
        query_gradient, key_gradient, value_gradient = banded_tiles.gradients(*inputs, window, scale)
    if holds_nan(query_gradient):
        return banded_tiles.gradients(*inputs, window, scale, exact=True)
    return query_gradient, key_gradient, value_gradient


def _fill_by_kernel(
    of_queries: Sequence[Tensor],
    of_keys: Sequence[Tensor],
    query_gradient_BTHD: Tensor,
    key_gradients_BTKD: Sequence[Tensor],
    bias_QL: Tensor,
    window: int,
    scale: float,
) -> None:
    """Write the gradients by torch's kernel, where no block of queries is longer than the window.

    A block at a time, as that computes fewer hidden pairs than one call; the last first, as its queries give
    each key the least weight, and a sum that begins small rounds less.

    Args:
        of_queries: gradient of the output, queries, output [B, T, H, D] and normalizer [B, T, H].
        of_keys: keys and values, [B, T, K, D].
        query_gradient_BTHD: to be written.
        key_gradients_BTKD: of keys and of values, to be written.
        bias_QL: of `_bias`; of no account where the window holds all tokens.
        window: keys that a query sees.
        scale: factor on the scores.
    """
    tokens, (behind, _) = query_gradient_BTHD.shape[1], reach(window, causal=True)
    count = -(-tokens // BLOCK)
    cuts = [tokens * number // count for number in range(count + 1)]
    cuts = [min(tokens, cut + -cut % QUERIES_AT_A_TIME) for cut in cuts]
    for total_BTKD in key_gradients_BTKD:
        total_BTKD[:, : max(0, cuts[-2] - behind)] = 0.0  # which the last block does not see
    for start, stop in reversed(list(pairwise(cuts))):
        queries = slice(start, stop)
        *of_block, normalizer_BQH = (tensor[:, queries] for tensor in of_queries)
        gradient_BHQD, query_BHQD, output_BHQD = map(for_kernel, of_block)
        by_some, by_all = max(0, start - behind), max(0, stop - 1 - behind)
        before = bias_QL.shape[1] - BLOCK - start
        for keys, hidden_QL in (
            (queries, None),
            (slice(by_all, start), None),
            (slice(by_some, by_all), bias_QL[: stop - start, before + by_some : before + by_all]),
        ):
            if keys.start == keys.stop:
                continue
            key_BKLD, value_BKLD = (for_kernel(tensor[:, keys]) for tensor in of_keys)
            of_query, *of_these_keys = _backward(
                gradient_BHQD,
                query_BHQD,
                key_BKLD,
                value_BKLD,
                output_BHQD,
                normalizer_BQH.transpose(1, 2),
                0.0,
                keys == queries,
                attn_mask=hidden_QL,
                scale=scale,
            )
            _put(query_gradient_BTHD[:, queries], of_query, add=keys != queries)
            for total_BTKD, part in zip(key_gradients_BTKD, of_these_keys, strict=True):
                _put(total_BTKD[:, keys], part, add=stop < tokens)


def _put(total_BTHD: Tensor, part_BHTD: Tensor, *, add: bool) -> None:
    (total_BTHD.add_ if add else total_BTHD.copy_)(part_BHTD.transpose(1, 2))


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
