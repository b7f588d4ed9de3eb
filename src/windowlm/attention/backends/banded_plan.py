"""Cuts queries and keys for `banded_matmul`: which keys each block meets, and which blocks go together.

Shapes: B batch, T queries, S keys, K key-value heads, G query heads a key-value head, D head dimension,
N blocks, Q queries a block, L keys in reach of a block, M blocks with a mask of their own, F queries of such
a block, C blocks of a run, P = Q G rows of a block.
"""

import math
from collections.abc import Iterable, Iterator, MutableMapping
from itertools import accumulate, groupby, pairwise
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..document_layout import PADDING
from ..window import Places, Visibility, reach, within_window
from .banded_threads import Share

BLOCK = 64
# Up to here the pairs that a block of 64 computes beside the visible ones cost more than smaller products do.
NARROW, NARROW_BLOCK = 256, 32
# From here on the keys of a block no longer fit in the cache: more queries share each reading of them.
WIDE, WIDE_BLOCK = 2048, 128
VECTOR = 16
# Queries at the start of a row see fewer keys than the others. So many are one block: each call takes as long
# as the pairs that a block of that size computes in vain.
START_BLOCK = 256
# Scores that are computed in one call: enough to outweigh the call, few enough to stay in the caches. Up to a
# third more spares another call.
RUN = 2**19
LONGEST_RUN = RUN * 4 // 3
# Numbers of masks that are laid out once for all calls, 4 MiB in float32; more would be too much to keep.
MOST_KEPT = 2**20
_kept: "MutableMapping[Tensor, dict[object, tuple[Block | Run, ...]]]" = WeakTensorKeyDictionary()


class Plan(NamedTuple):
    """Which keys each block of queries meets, and under which mask.

    Attributes:
        blocks: int64 [B or 1, N, 5]: first query, first and last + 1 of the keys, the column of the mask that
            the first key stands in, and the number of the block's own mask (-1: the common one).
        common: [Q, L], added to the scores: 0 where visible, -inf elsewhere.
        hidden: bool [M, F, L], the masks of blocks at the start of a row, or that meet the edge of a document
            or padding.
        blind: bool [M, F], queries of such blocks that see nothing, whose rows of `hidden` are open; [0, F]
            where all see something.
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
    # Blocks that meet sinks or the edge of a document stand alone, and half as many of them are faster.
    alone = visibility.sinks or visibility.documents is not None
    block = NARROW_BLOCK if visibility.window <= NARROW and not alone else BLOCK
    if visibility.window >= WIDE:
        block = WIDE_BLOCK
    column_L = torch.arange(behind + block + ahead, device="cpu")
    row_Q = torch.arange(block, device="cpu")
    hidden_QL = ~within_window(row_Q[:, None] + behind - column_L, visibility.window, visibility.causal)
    common = torch.zeros(hidden_QL.shape, device="cpu").masked_fill(hidden_QL, -torch.inf)

    first_query_N = torch.arange(0, queries, block, device="cpu")
    first_key_N = first_query_N + keys - queries - behind
    start_N, stop_N = first_key_N.clamp(min=0), (first_key_N + len(column_L)).clamp(max=keys)
    blocks_N5 = torch.stack(
        [first_query_N, start_N, stop_N, start_N - first_key_N, torch.full_like(start_N, -1)], -1
    )
    documents_BT, sinks = visibility.documents, min(visibility.sinks, keys)
    if documents_BT is None and not sinks:
        lacking = len(range(0, min(queries, behind - (keys - queries)), block))
        return _start_joined(visibility, blocks_N5, common, queries, keys, lacking)
    if documents_BT is None:
        assert visibility.positions is None
        documents_BT = torch.zeros(1, keys, dtype=torch.int32, device="cpu")
        block_M = torch.arange(len(range(keys - queries - behind, sinks, block)), device="cpu")[
            : len(start_N)
        ]
        row_M = torch.zeros_like(block_M)
    else:
        assert not sinks
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
    blocks_BN5 = blocks_N5.repeat(len(documents_BT), 1, 1)
    blocks_BN5[row_M, block_M] = torch.stack(
        [
            first_query_N[block_M],
            first_key_N[block_M] + first_M,
            first_key_N[block_M] + torch.where(seen_ML.any(1), last_M + 1, first_M),
            first_M,
            torch.arange(len(row_M), device="cpu"),
        ],
        dim=-1,
    )
    blind_MQ = ~visible_MQL.any(2)
    return Plan(blocks_BN5, common, ~(visible_MQL | blind_MQ[:, :, None]), blind_MQ, sinks)


def _start_joined(
    visibility: Visibility, blocks_N5: Tensor, common_QL: Tensor, queries: int, keys: int, lacking: int
) -> Plan:
    """A plan without documents or sinks: the first `lacking` blocks, which have fewer keys than the others,
    are joined to larger ones.
    """
    assert visibility.window is not None
    block = len(common_QL)
    joined = max(1, START_BLOCK // block)
    if lacking == 1:
        lacking = 0  # the common mask serves it as well
    firsts = range(0, lacking, joined)
    lasts = [min(first + joined, lacking) - 1 for first in firsts]
    first_M, last_M = (torch.tensor(list(each), dtype=torch.int64, device="cpu") for each in (firsts, lasts))
    stop_M, none_M = blocks_N5[last_M, 2], torch.zeros_like(first_M)
    starts_M5 = torch.stack(
        [first_M * block, none_M, stop_M, none_M, torch.arange(len(firsts), device="cpu")], -1
    )
    query_MF = first_M[:, None] * block + torch.arange(joined * block, device="cpu")
    distance_MFL = query_MF[:, :, None] + keys - queries - torch.arange(common_QL.shape[1], device="cpu")
    return Plan(
        torch.cat([starts_M5, blocks_N5[lacking:]])[None],
        common_QL,
        ~within_window(distance_MFL, visibility.window, visibility.causal),
        query_MF.new_empty(0, query_MF.shape[1], dtype=torch.bool),
        0,
    )


class Block(NamedTuple):
    """One block with all heads, [K, ...].

    Attributes:
        queries, keys: its place in the row.
        sinks: how many first keys of the row stand before `keys` in the L columns.
        bias: its mask [Q, L], added to the scores of each head.
        blind: bool [Q, 1], queries that see nothing; None where all see.
    """

    queries: slice
    sinks: int
    keys: slice
    bias: Tensor
    blind: Tensor | None

    def shifted(self, first: int) -> Self:
        """The same for keys of which the first is that one of the row."""
        assert first == 0 or not self.sinks
        return self._replace(keys=slice(self.keys.start - first, self.keys.stop - first))

    def rows(self, tokens_THD: Tensor, kv_heads: int) -> Tensor:
        """Rows of all query heads that share a key-value head, [K, P, D]; a view where each has its own."""
        return rearrange(tokens_THD[self.queries], "q (k g) d -> k (q g) d", k=kv_heads)

    def write(self, tokens_THD: Tensor, rows_KPD: Tensor) -> None:
        """Put rows back where `rows` takes them from."""
        target_QHD = tokens_THD[self.queries]
        target_QHD.copy_(rearrange(rows_KPD, "k (q g) d -> q (k g) d", q=len(target_QHD)))

    def keys_of(self, tokens_SKD: Tensor) -> Tensor:
        """The block's keys or values, [K, L, D]; a view where it has no sinks."""
        near_LKD = tokens_SKD[self.keys]
        if self.sinks:
            near_LKD = torch.cat([tokens_SKD[: self.sinks], near_LKD])
        return near_LKD.transpose(0, 1)

    def add_to_keys(self, total_SKD: Tensor, left_KLP: Tensor, right_KPD: Tensor, scale: float = 1.0) -> None:
        """Add the product, times `scale`, to the gradient of the block's keys or values."""
        if not self.sinks:
            total_SKD[self.keys].transpose(0, 1).baddbmm_(left_KLP, right_KPD, alpha=scale)
            return
        sum_LKD = torch.bmm(left_KLP, right_KPD).transpose(0, 1)
        total_SKD[: self.sinks].add_(sum_LKD[: self.sinks], alpha=scale)
        total_SKD[self.keys].add_(sum_LKD[self.sinks :], alpha=scale)

    def of_heads(self, of_all_heads: list[torch.Generator]) -> list[torch.Generator]:
        """What belongs to the heads that it holds."""
        return of_all_heads


class Run(NamedTuple):
    """Neighbouring blocks of one mask with one key-value head, [C, ...]: fewer calls for small blocks.

    Attributes:
        head: the key-value head.
        blocks: C, how many.
        block: Q, queries a block.
        first_query, first_key: of the first block.
        bias: their mask [Q, L].
    """

    head: int
    blocks: int
    block: int
    first_query: int
    first_key: int
    bias: Tensor
    blind: None = None

    def shifted(self, first: int) -> Self:
        """Like `Block.shifted`."""
        return self._replace(first_key=self.first_key - first)

    @property
    def span(self) -> slice:
        """The keys of all its blocks."""
        return slice(self.first_key, self.first_key + (self.blocks - 1) * self.block + self.bias.shape[1])

    def rows(self, tokens_THD: Tensor, kv_heads: int) -> Tensor:
        """Like `Block.rows`, [C, P, D]."""
        # Called so often that einops would take as long as a small product.
        of_head_TGD = self._queries(tokens_THD, kv_heads)
        return of_head_TGD.reshape(self.blocks, -1, of_head_TGD.shape[2])

    def write(self, tokens_THD: Tensor, rows_CPD: Tensor) -> None:
        """Like `Block.write`."""
        groups = rows_CPD.shape[1] // self.block
        target_TGD = self._queries(tokens_THD, tokens_THD.shape[1] // groups)
        target_TGD.copy_(rows_CPD.view_as(target_TGD))

    def keys_of(self, tokens_SKD: Tensor) -> Tensor:
        """Like `Block.keys_of`, [C, L, D]: a view in which the blocks overlap."""
        return tokens_SKD[self.span, self.head].unfold(0, self.bias.shape[1], self.block).mT

    def add_to_keys(self, total_SKD: Tensor, left_CLP: Tensor, right_CPD: Tensor, scale: float = 1.0) -> None:
        """Like `Block.add_to_keys`, for blocks at a time whose keys do not overlap."""
        total_CLD = self.keys_of(total_SKD)
        step = -(-self.bias.shape[1] // self.block)
        for start in range(min(step, self.blocks)):
            apart = slice(start, None, step)
            total_CLD[apart].baddbmm_(left_CLP[apart], right_CPD[apart], alpha=scale)

    def of_heads(self, of_all_heads: list[torch.Generator]) -> list[torch.Generator]:
        """Like `Block.of_heads`."""
        return [of_all_heads[self.head]]

    def _queries(self, tokens_THD: Tensor, kv_heads: int) -> Tensor:
        groups = tokens_THD.shape[1] // kv_heads
        tokens = slice(self.first_query, self.first_query + self.blocks * self.block)
        return tokens_THD[tokens, self.head * groups : (self.head + 1) * groups]


def blocks_of(
    plan: Plan, share: Share, queries: int, kv_heads: int, groups: int, dtype: torch.dtype
) -> Iterable[Block | Run]:
    """The blocks of a share, alone or in runs; those that see nothing are left out.

    They are kept as long as the plan, for its other layers and passes, unless their masks are large.
    """
    if plan.hidden.numel() > MOST_KEPT:
        return _lay_out(plan, share, queries, kv_heads, groups, dtype)
    of_plan = _kept.setdefault(plan.blocks, {})
    row = min(share.row, len(plan.blocks) - 1)
    call = row, share.part, share.parts, queries, kv_heads, groups, dtype
    if call not in of_plan:
        of_plan[call] = tuple(_lay_out(plan, share, queries, kv_heads, groups, dtype))
    return of_plan[call]


def _lay_out(
    plan: Plan, share: Share, queries: int, kv_heads: int, groups: int, dtype: torch.dtype
) -> Iterator[Block | Run]:
    block, length = plan.common.shape
    rows = _rows_of(plan, share, queries)
    whole = [
        own < 0 and stop - start == length and size == block and not plan.sinks
        for size, _, start, stop, _, own in rows
    ]
    common_QL = F.pad(plan.common.to(dtype), (plan.sinks, 0))
    some_blind = plan.blind.any(1).tolist()
    for number, blocks in _runs(whole, max(1, RUN // (groups * common_QL.numel()))):
        size, query, start, stop, column, own = rows[number]
        if start == stop:
            continue
        sinks = min(plan.sinks, start)
        bias_QL = common_QL[:, column : column + sinks + stop - start]
        if own >= 0 or size < block or (sinks and column):
            own_QL = _own_bias(plan, own, size, slice(column, column + stop - start), dtype)
            bias_QL = F.pad(own_QL, (sinks, 0))
        if blocks > 1 or size > block:
            for head in range(kv_heads):
                yield Run(head, blocks, size, query, start, bias_QL)
            continue
        blind_Q1 = None
        if 0 <= own < len(some_blind) and some_blind[own]:
            blind_Q1 = plan.blind[own, :size, None]
        yield Block(slice(query, query + size), sinks, slice(start, stop), bias_QL, blind_Q1)


def keys_met(plan: Plan, share: Share, queries: int) -> slice:
    """The keys from the first to the last that a block of the share meets."""
    met = [(start, stop) for _, _, start, stop, _, _ in _rows_of(plan, share, queries) if start < stop]
    if not met:
        return slice(0, 0)
    first = 0 if plan.sinks else min(start for start, _ in met)
    return slice(first, max(stop for _, stop in met))


def _rows_of(plan: Plan, share: Share, queries: int) -> list[tuple[int, ...]]:
    """How many queries each block of the share has, and its row of `Plan.blocks`."""
    rows = plan.blocks[min(share.row, len(plan.blocks) - 1)].tolist()
    ends = [*(query for query, *_ in rows[1:]), queries]
    sized = [(end - row[0], *row) for row, end in zip(rows, ends, strict=True)]
    first, last = _part(
        [size * (stop - start) for size, _, start, stop, _, _ in sized], share.part, share.parts
    )
    return sized[first:last]


def _own_bias(plan: Plan, own: int, size: int, columns: slice, dtype: torch.dtype) -> Tensor:
    """The mask [Q, L] of a block that the common one does not fit."""
    if own < 0:
        return plan.common[:size, columns].to(dtype)
    hidden_QL = plan.hidden[own, :size, columns]
    return torch.zeros(hidden_QL.shape, dtype=dtype, device="cpu").masked_fill_(hidden_QL, -torch.inf)


def _part(pairs: list[int], part: int, parts: int) -> tuple[int, int]:
    """First and last + 1 of the part's blocks, of which each computes so many pairs."""
    so_far = list(accumulate(pairs, initial=0))
    first, last = (
        min(range(len(so_far)), key=lambda number: abs(so_far[number] - share))
        for share in (so_far[-1] * part / parts, so_far[-1] * (part + 1) / parts)
    )
    return (first if part else 0), (last if part + 1 < parts else len(pairs))


def _runs(whole: list[bool], size: int) -> Iterator[tuple[int, int]]:
    """First block and number of blocks to take together: neighbours that are whole, about `size` of them."""
    first = 0
    for together, neighbours in groupby(whole):
        count = len(list(neighbours))
        runs = max(1, math.ceil(count / size - 1 / 3)) if together else count
        cuts = [first + count * run // runs for run in range(runs + 1)]
        yield from ((start, stop - start) for start, stop in pairwise(cuts))
        first += count
