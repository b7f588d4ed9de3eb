"""The CPU's way over the band: one block of queries at a time, all heads in one batched matrix product.

Keys and values are read in place through strided views, the scores of a block stay in the processor's cache,
and the backward pass keeps nothing but query, key and value: it computes the weights again. The two
operators are opaque to torch.compile. `banded_blocks` computes the same through torch's own attention.

Shapes: B batch, T queries, S keys, K key-value heads, G query heads a key-value head, D head dimension,
N blocks, Q queries a block, L keys in reach of a block, M blocks with a mask of their own,
P = G Q rows of a block.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Lock
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..window import PADDING, Places, Visibility, reach, within_window
from .scaled_dot_product import Scoring

BLOCK = 64
# From here on the keys of a block no longer fit in the cache: more queries share each reading of them.
WIDE, WIDE_BLOCK = 2048, 128
VECTOR = 16


def attend(
    query_BTHD: Tensor,
    key_BSKD: Tensor,
    value_BSKD: Tensor,
    visibility: Visibility,
    scoring: Scoring,
) -> Tensor:
    """Attention where the keys are in order, with sinks or documents, not both; returns [B, T, H, D]."""
    queries, keys = query_BTHD.shape[1], key_BSKD.shape[1]
    plan = visibility.once(("banded matmul", queries, keys), lambda: make_plan(visibility, queries, keys))
    scale, dropout = scoring.scale, scoring.dropout
    seed = torch.randint(2**62, ()) if dropout else torch.zeros((), dtype=torch.int64)
    output: Tensor = _attend(query_BTHD, key_BSKD, value_BSKD, *plan, scale, dropout, seed)
    return output


class Plan(NamedTuple):
    """Which keys each block of queries meets, and under which mask.

    Attributes:
        blocks: int64 [B or 1, N, 4]: first and last + 1 of the keys, the column of the mask that the first
            key stands in, and the number of the block's own mask (-1: the common one).
        common: [Q, L], added to the scores: 0 where visible, -inf elsewhere.
        hidden: bool [M, Q, L], the masks of blocks that meet the edge of a document or padding.
        blind: bool [M, Q], queries of such blocks that see nothing; their rows of `hidden` are open.
        sinks: how many first keys are visible to all; those before a block's keys are met besides.
    """

    blocks: Tensor
    common: Tensor
    hidden: Tensor
    blind: Tensor
    sinks: int


def make_plan(visibility: Visibility, queries: int, keys: int) -> Plan:
    """Lay out the blocks; those that meet the edge of a document, padding or sinks get masks of their own."""
    assert visibility.window is not None
    behind, ahead = reach(visibility.window, visibility.causal)
    behind += -behind % VECTOR
    block = WIDE_BLOCK if visibility.window >= WIDE else BLOCK
    column_L = torch.arange(behind + block + ahead)
    row_Q = torch.arange(block)
    hidden_QL = ~within_window(row_Q[:, None] + behind - column_L, visibility.window, visibility.causal)
    common = torch.zeros(hidden_QL.shape).masked_fill(hidden_QL, -torch.inf)

    first_query_N = torch.arange(0, queries, block)
    first_key_N = first_query_N + keys - queries - behind
    start_N, stop_N = first_key_N.clamp(min=0), (first_key_N + len(column_L)).clamp(max=keys)
    blocks_1N4 = torch.stack([start_N, stop_N, start_N - first_key_N, torch.full_like(start_N, -1)], -1)[None]
    documents_BT = visibility.documents
    if documents_BT is None and not visibility.sinks:
        nothing = hidden_QL.new_empty(0, 0)
        return Plan(blocks_1N4, common, nothing[None], nothing, 0)
    if documents_BT is None:
        assert visibility.positions is None
        documents_BT = torch.zeros(1, keys, dtype=torch.int32)
        block_M = torch.arange(len(range(keys - queries - behind, visibility.sinks, block)))[: len(start_N)]
        row_M = torch.zeros_like(block_M)
    else:
        assert not visibility.sinks
        changes_BT = (documents_BT.diff(dim=1, prepend=documents_BT[:, :1]) != 0).cumsum(1)
        changing_BN = changes_BT[:, start_N] != changes_BT[:, stop_N - 1]
        edges_BN = changing_BN | (documents_BT[:, start_N] == PADDING)
        row_M, block_M = edges_BN.nonzero(as_tuple=True)
    places = visibility.places(queries, keys, documents_BT.device)
    query_MQ = first_query_N[block_M, None] + row_Q
    key_ML = first_key_N[block_M, None] + column_L
    inside_MQ, inside_ML = query_MQ < queries, (key_ML >= 0) & (key_ML < keys)
    query_MQ, key_ML, row_M1 = query_MQ.clamp(max=queries - 1), key_ML.clamp(0, keys - 1), row_M[:, None]
    visible_MQL = visibility.between(
        Places(
            places.query_positions[row_M1, query_MQ],
            places.key_positions[row_M1, key_ML],
            documents_BT[row_M1, query_MQ],
            documents_BT[row_M1, key_ML],
        )
    )
    visible_MQL &= inside_MQ[:, :, None] & inside_ML[:, None, :]
    seen_ML = visible_MQL.any(1)
    first_M = seen_ML.int().argmax(1)
    last_M = len(column_L) - 1 - seen_ML.flip(1).int().argmax(1)
    blocks_BN4 = blocks_1N4.repeat(len(documents_BT), 1, 1)
    blocks_BN4[row_M, block_M] = torch.stack(
        [
            first_key_N[block_M] + first_M,
            first_key_N[block_M] + torch.where(seen_ML.any(1), last_M + 1, first_M),
            first_M,
            torch.arange(len(row_M)),
        ],
        dim=-1,
    )
    blind_MQ = ~visible_MQL.any(2)
    return Plan(blocks_BN4, common, ~(visible_MQL | blind_MQ[:, :, None]), blind_MQ, visibility.sinks)


class _Block(NamedTuple):
    """A block's place in its row, its mask `bias` [P, L], and `blind` [P, 1] (None where all rows see).

    The first `sinks` keys of the row stand before `keys` in the L columns.
    """

    queries: slice
    sinks: int
    keys: slice
    bias: Tensor
    blind: Tensor | None


def _blocks(plan: Plan, index: int, row: "_Row") -> Iterator[_Block]:
    queries, groups, dtype = len(row.query_THD), row.query_THD.shape[1] // row.kv_heads, row.dtype
    block_size = len(plan.common)
    common_PL = F.pad(plan.common.to(dtype), (plan.sinks, 0)).repeat(groups, 1)
    some_blind = plan.blind.any(1).tolist()
    rows = plan.blocks[min(index, len(plan.blocks) - 1)].tolist()
    for first_query, (start, stop, column, own) in zip(range(0, queries, block_size), rows, strict=True):
        last_query = min(first_query + block_size, queries)
        size, columns = last_query - first_query, slice(column, column + stop - start)
        sinks = min(plan.sinks, start)
        if start == stop:
            continue
        blind_P1 = None
        if own < 0 and size == block_size and not (sinks and column):
            bias_PL = common_PL[:, column : column + sinks + stop - start]
        else:
            bias_QL = plan.common[:size, columns].to(dtype)
            if own >= 0:
                hidden_QL = plan.hidden[own, :size, columns]
                bias_QL = torch.zeros_like(bias_QL).masked_fill_(hidden_QL, -torch.inf)
                if some_blind[own]:
                    blind_P1 = plan.blind[own, :size].repeat(groups)[:, None]
            bias_PL = F.pad(bias_QL, (sinks, 0)).repeat(groups, 1)
        yield _Block(slice(first_query, last_query), sinks, slice(start, stop), bias_PL, blind_P1)


class _Row:
    """Query, key and value of one row of the batch in the dtype of the computation, and room for scores."""

    def __init__(
        self,
        query_THD: Tensor,
        key_SKD: Tensor,
        value_SKD: Tensor,
        plan: Plan,
        scale: float,
        drop: "_Drop | None",
    ) -> None:
        dtype = torch.promote_types(query_THD.dtype, torch.float32)
        self.query_THD, self.key_SKD, self.value_SKD = (
            tensor.to(dtype) for tensor in (query_THD, key_SKD, value_SKD)
        )
        self.kv_heads, self.scale, self.dtype = key_SKD.shape[1], scale, dtype
        self.room = query_THD.shape[1] * len(plan.common) * (plan.sinks + plan.common.shape[1])
        self.scores = self.query_THD.new_empty(self.room)
        self.drop = drop
        self.factors = self.query_THD.new_empty(0 if drop is None else self.room)

    def by_head(self, heads_QHD: Tensor) -> Tensor:
        """Rows of all query heads that share a key-value head, [K, P, D]; a view where each has its own."""
        return rearrange(heads_QHD, "q (k g) d -> k (g q) d", k=self.kv_heads)

    def by_token(self, heads_KPD: Tensor, queries: int) -> Tensor:
        """The inverse of `by_head`."""
        return rearrange(heads_KPD, "k (g q) d -> q (k g) d", q=queries)

    def keys_of(self, block: _Block, tokens_SKD: Tensor) -> Tensor:
        """The block's keys or values, [K, L, D]; a view where it has no sinks."""
        near_LKD = tokens_SKD[block.keys]
        if block.sinks:
            near_LKD = torch.cat([tokens_SKD[: block.sinks], near_LKD])
        return near_LKD.transpose(0, 1)

    def add_to_keys(
        self, block: _Block, total_SKD: Tensor, left_KLP: Tensor, right_KPD: Tensor, scale: float = 1.0
    ) -> None:
        """Add the product, times `scale`, to the gradient of the block's keys or values."""
        if not block.sinks:
            total_SKD[block.keys].transpose(0, 1).baddbmm_(left_KLP, right_KPD, alpha=scale)
            return
        sum_LKD = torch.bmm(left_KLP, right_KPD).transpose(0, 1)
        total_SKD[: block.sinks].add_(sum_LKD[: block.sinks], alpha=scale)
        total_SKD[block.keys].add_(sum_LKD[block.sinks :], alpha=scale)

    def weights(self, block: _Block) -> Tensor:
        """Softmax weights [K, P, L] of a block; they live until the next call."""
        query_KPD = self.by_head(self.query_THD[block.queries])
        key_KLD = self.keys_of(block, self.key_SKD)
        shape = (self.kv_heads, *block.bias.shape)
        scores_KPL = self.scores[: shape[0] * shape[1] * shape[2]].view(shape)
        torch.baddbmm(block.bias, query_KPD, key_KLD.mT, alpha=self.scale, out=scores_KPL)
        torch.softmax(scores_KPL, -1, out=scores_KPL)
        return scores_KPL if block.blind is None else scores_KPL.masked_fill_(block.blind, 0.0)

    def dropout_factors(self, weights_KPL: Tensor) -> Tensor | None:
        """What dropout multiplies the weights of the next block by; None where nothing is dropped."""
        if self.drop is None:
            return None
        return self.drop.factors(self.factors[: weights_KPL.numel()].view_as(weights_KPL))


class _Drop:
    """Draws of dropout for some heads of a row: the backward pass draws again what the forward drew.

    Each head has a generator of its own, so that the draws do not depend on how threads share the heads.
    Sixteen random bits a weight, as drawing them takes a sixth of the time of `bernoulli_`; the probability
    is rounded to a multiple of 2^-16, and the weights kept are scaled by what is then expected.
    """

    STEPS = 2**16

    def __init__(self, probability: float, seeds: range) -> None:
        self.dropped = min(round(probability * self.STEPS), self.STEPS - 1)
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def factors(self, room_KPL: Tensor) -> Tensor:
        """Fill the room with 0 for a dropped weight and the inverse of the share kept for others."""
        per_head = room_KPL[0].numel()
        words = torch.empty(len(self.generators), -(-per_head // 4), dtype=torch.int64)
        for words_of_head, generator in zip(words, self.generators, strict=True):
            words_of_head.random_(-(2**63), None, generator=generator)
        bits_KPL = words.view(torch.int16)[:, :per_head].reshape(room_KPL.shape)
        torch.ge(bits_KPL, self.dropped - self.STEPS // 2, out=room_KPL)
        return room_KPL.mul_(self.STEPS / (self.STEPS - self.dropped))


def _drop(dropout: float, seed: Tensor, index: int, kv_heads: slice, all_kv_heads: int) -> _Drop | None:
    if not dropout:
        return None
    first = int(seed) + index * all_kv_heads
    return _Drop(dropout, range(first + kv_heads.start, first + min(kv_heads.stop, all_kv_heads)))


def _like(heads_BTHD: Tensor, plan: Plan) -> Tensor:
    """Contiguous room for a result; zeros where blocks may be passed over."""
    allocate = torch.zeros if len(plan.hidden) else torch.empty
    return allocate(heads_BTHD.shape, dtype=heads_BTHD.dtype)


_ONE_AT_A_TIME = Lock()


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads that are kept, as a new one takes a millisecond; a forked process needs its own."""
    return ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))


def _in_parallel(fill: Callable[[int, slice, slice], None], query_BTHD: Tensor, key_BSKD: Tensor) -> None:
    """Fill the rows of the batch and shares of their heads, each share by a thread of its own.

    The operations on a block are too short to share: each would wait for the slower thread. The number
    of threads is one for the process meanwhile, as matrix products know no other.
    """
    batch, kv_heads = key_BSKD.shape[0], key_BSKD.shape[2]
    groups = query_BTHD.shape[2] // kv_heads
    with _ONE_AT_A_TIME, torch.autocast("cpu", enabled=False):
        threads = torch.get_num_threads()
        share = -(-kv_heads // threads)
        tasks = [
            (index, slice(first, first + share), slice(first * groups, (first + share) * groups))
            for index in range(batch)
            for first in range(0, kv_heads, share)
        ]
        if threads == 1 or len(tasks) == 1:
            for task in tasks:
                fill(*task)
            return

        def alone(task: tuple[int, slice, slice]) -> None:
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                fill(*task)

        torch.set_num_threads(1)
        try:
            list(_pool(threads, os.getpid()).map(alone, tasks))
        finally:
            torch.set_num_threads(threads)


_NAMESPACE = __name__.replace(".", "_")


@torch.library.custom_op(f"{_NAMESPACE}::attend", mutates_args=())
def _attend(
    query_BTHD: Tensor,
    key_BSKD: Tensor,
    value_BSKD: Tensor,
    blocks: Tensor,
    common: Tensor,
    hidden: Tensor,
    blind: Tensor,
    sinks: int,
    scale: float,
    dropout: float,
    seed: Tensor,
) -> Tensor:
    plan = Plan(blocks, common, hidden, blind, sinks)
    output_BTHD = _like(query_BTHD, plan)

    def fill(index: int, kv_heads: slice, q_heads: slice) -> None:
        row = _Row(
            query_BTHD[index, :, q_heads],
            key_BSKD[index, :, kv_heads],
            value_BSKD[index, :, kv_heads],
            plan,
            scale,
            _drop(dropout, seed, index, kv_heads, key_BSKD.shape[2]),
        )
        for block in _blocks(plan, index, row):
            weights_KPL = row.weights(block)
            factors_KPL = row.dropout_factors(weights_KPL)
            if factors_KPL is not None:
                weights_KPL.mul_(factors_KPL)
            mixed_KPD = torch.bmm(weights_KPL, row.keys_of(block, row.value_SKD))
            target_QHD = output_BTHD[index, block.queries, q_heads]
            target_QHD.copy_(row.by_token(mixed_KPD, len(target_QHD)))

    _in_parallel(fill, query_BTHD, key_BSKD)
    return output_BTHD


@torch.library.custom_op(f"{_NAMESPACE}::attend_backward", mutates_args=())
def _attend_backward(
    gradient_BTHD: Tensor,
    query_BTHD: Tensor,
    key_BSKD: Tensor,
    value_BSKD: Tensor,
    blocks: Tensor,
    common: Tensor,
    hidden: Tensor,
    blind: Tensor,
    sinks: int,
    scale: float,
    dropout: float,
    seed: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    plan = Plan(blocks, common, hidden, blind, sinks)
    query_gradient_BTHD = _like(query_BTHD, plan)
    key_gradient_BSKD, value_gradient_BSKD = (
        torch.zeros(key_BSKD.shape, dtype=key_BSKD.dtype) for _ in range(2)
    )

    def fill(index: int, kv_heads: slice, q_heads: slice) -> None:
        row = _Row(
            query_BTHD[index, :, q_heads],
            key_BSKD[index, :, kv_heads],
            value_BSKD[index, :, kv_heads],
            plan,
            scale,
            _drop(dropout, seed, index, kv_heads, key_BSKD.shape[2]),
        )
        gradient_THD = gradient_BTHD[index, :, q_heads].to(row.dtype)
        key_gradient_SKD = key_gradient_BSKD[index, :, kv_heads].to(row.dtype)
        value_gradient_SKD = value_gradient_BSKD[index, :, kv_heads].to(row.dtype)
        room = torch.empty_like(row.scores)
        for block in _blocks(plan, index, row):
            weights_KPL = row.weights(block)
            gradient_KPD = row.by_head(gradient_THD[block.queries])
            query_KPD = row.by_head(row.query_THD[block.queries])
            key_KLD, value_KLD = row.keys_of(block, row.key_SKD), row.keys_of(block, row.value_SKD)
            scores_gradient_KPL = room[: weights_KPL.numel()].view_as(weights_KPL)
            factors_KPL = row.dropout_factors(weights_KPL)
            kept_KPL = weights_KPL
            if factors_KPL is not None:
                kept_KPL = torch.mul(weights_KPL, factors_KPL, out=scores_gradient_KPL)
            row.add_to_keys(block, value_gradient_SKD, kept_KPL.mT, gradient_KPD)
            torch.bmm(gradient_KPD, value_KLD.mT, out=scores_gradient_KPL)
            if factors_KPL is not None:
                scores_gradient_KPL.mul_(factors_KPL)
            torch.ops.aten._softmax_backward_data.out(
                scores_gradient_KPL, weights_KPL, -1, row.dtype, grad_input=scores_gradient_KPL
            )
            row.add_to_keys(block, key_gradient_SKD, scores_gradient_KPL.mT, query_KPD, scale)
            mixed_KPD = torch.bmm(scores_gradient_KPL, key_KLD).mul_(scale)
            target_QHD = query_gradient_BTHD[index, block.queries, q_heads]
            target_QHD.copy_(row.by_token(mixed_KPD, len(target_QHD)))
        key_gradient_BSKD[index, :, kv_heads] = key_gradient_SKD
        value_gradient_BSKD[index, :, kv_heads] = value_gradient_SKD

    _in_parallel(fill, query_BTHD, key_BSKD)
    return query_gradient_BTHD, key_gradient_BSKD, value_gradient_BSKD


@_attend.register_fake
def _fake_attend(query_BTHD: Tensor, *_: object) -> Tensor:
    return query_BTHD.new_empty(query_BTHD.shape)


@_attend_backward.register_fake
def _fake_attend_backward(
    gradient_BTHD: Tensor, query_BTHD: Tensor, key_BSKD: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (tensor.new_empty(tensor.shape) for tensor in (query_BTHD, key_BSKD, key_BSKD))
    return query, key, value


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.sinks, ctx.scale, ctx.dropout, seed = inputs
    ctx.save_for_backward(*tensors, seed)


def _differentiate(ctx: Any, gradient_BTHD: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, seed = ctx.saved_tensors
    gradients = _attend_backward(gradient_BTHD, *tensors, ctx.sinks, ctx.scale, ctx.dropout, seed)
    return *gradients, *[None] * 8


_attend.register_autograd(_differentiate, setup_context=_save)
