"""Gradients of causal attention over wide windows on a CPU: a tile of keys after the other, with its queries.

Torch's own kernel computes up to 512 keys beyond those that a query sees, steps through memory by powers of
two, and shares nothing smaller than a head among threads. Here the keys of a tile are read from a copy,
scores never leave the processor's caches, and the weights are computed again from the softmax's denominators,
to base e as these were: a factor on large scores would round them once more.

Shapes: B batch, T queries (as many keys), H query heads, K key-value heads, G query heads a key-value head,
D head dimension, Q queries and L keys of a tile, P = Q G rows of a tile, R = T G.
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple, Self

import torch
from einops import rearrange
from torch import Tensor

from ..window import reach, within_window
from .banded_threads import Share, in_parallel, shares_of
from .banded_workspace import Workspace

# Of a tile: enough to outweigh the calls, few enough for the caches.
ROWS, KEYS = 112, 560
# Up to here one tile holds all keys, so that the softmax is computed again as it is defined.
ONE_TILE = 784
# Products in a call, over several heads where tiles are small, and those that are worth a second thread.
PRODUCTS, SHARED = 2**24, 2**25
# Rows of scores that lie a multiple of this apart push one another out of the caches.
STRIDE, VECTOR = 128, 16


def gradients(
    gradient_BTHD: Tensor,
    query_BTHD: Tensor,
    key_BTKD: Tensor,
    value_BTKD: Tensor,
    output_BTHD: Tensor,
    normalizer_BTH: Tensor,
    window: int,
    scale: float,
    *,
    exact: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value.

    Args:
        gradient_BTHD: gradient of the output.
        query_BTHD: queries.
        key_BTKD: keys.
        value_BTKD: values.
        output_BTHD: what attention gave.
        normalizer_BTH: logarithms of the softmax's denominators.
        window: keys that a query sees, up to T.
        scale: factor on the scores.
        exact: right where a product with a hidden key or value overflows too.
    """
    tiles = _Tiles.fit(query_BTHD, key_BTKD, window, exact)
    query_gradient_BTHD, key_gradient_BTKD, value_gradient_BTKD = (
        torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        for tensor in (query_BTHD, key_BTKD, value_BTKD)
    )

    def compute(share: Share) -> tuple[slice, Tensor] | None:
        keys = tiles.part(share.part, share.parts)
        queries = tiles.seeing(keys)
        own = share.row, queries, share.heads
        kv_heads = share.row, slice(None), share.kv_heads
        query_gradient_THD = tiles.by_token(
            _differentiate(
                tiles,
                keys,
                (gradient_BTHD[own], query_BTHD[own], output_BTHD[own], normalizer_BTH[own]),
                (key_BTKD[kv_heads], value_BTKD[kv_heads]),
                (key_gradient_BTKD[kv_heads], value_gradient_BTKD[kv_heads]),
                scale,
            )
        )
        if share.parts > 1:
            return queries, query_gradient_THD.clone()
        query_gradient_BTHD[own] = query_gradient_THD
        return None

    shares = tiles.shares(query_BTHD, key_BTKD)
    for share, part in zip(shares, in_parallel(compute, shares), strict=True):
        if part is not None:  # in the order of the parts, so that sums repeat bit by bit
            queries, added_THD = part
            own_THD = query_gradient_BTHD[share.row, :, share.heads]
            if share.part == 0:
                own_THD.zero_()
            own_THD[queries] += added_THD
    return query_gradient_BTHD, key_gradient_BTKD, value_gradient_BTKD


class _Tiles(NamedTuple):
    """How queries and keys are cut.

    Attributes:
        tokens, groups: T and G.
        behind: keys that a query sees before its own.
        queries, keys: of the largest tile; keys are cut where blocks of queries begin.
        ahead_bias, behind_bias: [Q, Q], added to the scores of the queries' own keys, and of the keys that
            stand `behind` before these: 0 where visible, -inf elsewhere.
        exact: whether hidden scores are replaced, and not added to.
    """

    tokens: int
    groups: int
    behind: int
    queries: int
    keys: int
    ahead_bias: Tensor
    behind_bias: Tensor
    exact: bool

    @classmethod
    def fit(cls, query_BTHD: Tensor, key_BTKD: Tensor, window: int, exact: bool) -> Self:
        _, tokens, heads, head_dim = query_BTHD.shape
        groups, behind = heads // key_BTKD.shape[2], reach(window, causal=True)[0]
        keys = tokens if tokens <= ONE_TILE else KEYS
        queries = min(ROWS, PRODUCTS // (groups * keys * head_dim)) // VECTOR * VECTOR
        queries = min(tokens, max(VECTOR, queries))
        keys = -(-keys // queries) * queries
        ahead_bias, behind_bias = _biases(queries, window, query_BTHD.dtype)
        return cls(tokens, groups, behind, queries, keys, ahead_bias, behind_bias, exact)

    def shares(self, query_BTHD: Tensor, key_BTKD: Tensor) -> list[Share]:
        """Shares of as many heads as are computed at once, or of the keys where there is much to share."""
        rows, head_dim = self.queries * self.groups, query_BTHD.shape[3]
        pairs = query_BTHD[..., 0].numel() * min(self.tokens // 2, self.behind + 1)
        return shares_of(
            query_BTHD,
            key_BTKD,
            divisible=pairs * head_dim > SHARED,
            most_heads=max(1, PRODUCTS // (rows * self.keys * head_dim)),
        )

    def part(self, part: int, parts: int) -> tuple[int, int]:
        """First and last + 1 of the keys of a part; the parts are seen by about as many queries each."""
        if parts == 1:
            return 0, self.tokens
        seen_T = torch.arange(self.tokens, 0, -1, device="cpu").clamp(max=self.behind + 1).cumsum(0)
        shares = seen_T[-1] * torch.arange(1, parts, device="cpu") // parts
        ends = torch.searchsorted(seen_T, shares)
        cuts = [0, *(ends // self.queries * self.queries).tolist(), self.tokens]
        return cuts[part], cuts[part + 1]

    def seeing(self, keys: tuple[int, int]) -> slice:
        """The queries, in whole blocks, that see some of a part's keys."""
        first, last = keys
        return slice(first, min(self.tokens, -(-(last + self.behind) // self.queries) * self.queries))

    def of_keys(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """First and last + 1 of the keys of each tile, about as many in each."""
        tiles = max(1, -(-(last - first) // self.keys))
        step = max(1, -(-(last - first) // (tiles * self.queries))) * self.queries
        for start in range(first, last, step):
            yield start, min(start + step, last)

    def rows(self, tokens_THC: Tensor) -> Tensor:
        """Rows [K, (T G), C], those that share a key-value head beside each other."""
        return rearrange(tokens_THC, "t (k g) c -> k (t g) c", g=self.groups)

    def by_token(self, rows_KRC: Tensor) -> Tensor:
        """The inverse of `rows`."""
        return rearrange(rows_KRC, "k (t g) c -> t (k g) c", g=self.groups)

    def blocks(self, *rows_KRC: Tensor) -> list[tuple[Tensor, ...]]:
        """The rows of each block of queries."""
        parts = (torch.split(rows, self.queries * self.groups, dim=1) for rows in rows_KRC)
        return list(zip(*parts, strict=True))

    def hide(self, scores_KPL: Tensor, query: int, key: int, value: float = -torch.inf) -> None:
        """Hide what is beyond the window in the tile that begins with this query and this key.

        By adding -inf, or by writing the value where asked to be exact.
        """
        queries, keys = scores_KPL.shape[1] // self.groups, scores_KPL.shape[2]
        for bias_QQ, stands in ((self.ahead_bias, query), (self.behind_bias, query - self.behind)):
            low, high = max(key, stands), min(key + keys, stands + queries)
            if low < high:
                near_KQGL = scores_KPL[..., low - key : high - key].view(-1, queries, self.groups, high - low)
                bias_QGL = bias_QQ[:queries, None, low - stands : high - stands]
                if self.exact:
                    near_KQGL.masked_fill_(bias_QGL == -torch.inf, value)
                else:
                    near_KQGL += bias_QGL


@lru_cache(maxsize=16)
def _biases(queries: int, window: int, dtype: torch.dtype) -> list[Tensor]:
    """`ahead_bias` and `behind_bias`."""
    index_Q = torch.arange(queries, device="cpu")
    distance_QQ = index_Q[:, None] - index_Q
    return [
        torch.zeros(queries, queries, dtype=dtype, device="cpu").masked_fill_(
            ~within_window(distance_QQ + shift, window, causal=True), -torch.inf
        )
        for shift in (0, reach(window, causal=True)[0])
    ]


def _differentiate(
    tiles: _Tiles,
    keys: tuple[int, int],
    of_queries: tuple[Tensor, Tensor, Tensor, Tensor],
    of_keys: tuple[Tensor, Tensor],
    of_key_gradients: tuple[Tensor, Tensor],
    scale: float,
) -> Tensor:
    """Write the gradients of a range of keys and values; returns what they add to those of queries.

    Of queries there are those in whose sight the keys are. What is returned is [K, R, D], good until the next
    workspace.
    """
    gradient_THD, query_THD, output_THD, normalizer_TH = of_queries
    kv_heads = of_keys[0].shape[1]
    workspace = Workspace(query_THD.dtype)
    rooms = _Rooms(workspace, tiles, kv_heads)
    room_for_keys = workspace.empty(4, kv_heads, tiles.keys, query_THD.shape[2])
    query_KRD = tiles.rows(query_THD)
    query_gradient_KRD = workspace.empty(*query_KRD.shape).zero_()
    blocks = tiles.blocks(
        query_KRD,
        tiles.rows(gradient_THD),
        tiles.rows(-normalizer_TH[..., None]),
        # What the gradient of the softmax takes off all scores of a row.
        tiles.rows((gradient_THD * output_THD).sum(-1, keepdim=True).neg_()),
        query_gradient_KRD,
    )
    for start, stop in tiles.of_keys(*keys):
        of_tile = room_for_keys[:, :, : stop - start].unbind()
        for room_KLD, tokens_TKD in zip(of_tile, of_keys, strict=False):
            room_KLD.copy_(tokens_TKD[start:stop].transpose(0, 1))
        for total_KLD in of_tile[2:]:
            total_KLD.zero_()
        # The last queries first: where they see all keys they give each the least weight, and a sum that
        # begins small rounds less.
        for query in reversed(range(start, min(tiles.tokens, stop + tiles.behind), tiles.queries)):
            low, high = max(start, query - tiles.behind), min(stop, query + tiles.queries)
            near = of_tile
            if high - low < stop - start:
                near = tuple(tensor[:, low - start : high - start] for tensor in of_tile)
            key_KLD, value_KLD, key_total_KLD, value_total_KLD = near
            block = (query - keys[0]) // tiles.queries
            query_KPD, gradient_KPD, shift_KP1, drift_KP1, query_total_KPD = blocks[block]
            whole = low == max(0, query - tiles.behind) and high == min(tiles.tokens, query + tiles.queries)
            weights_KPL, weights_KLP, scores_KPL, scores_KLP = rooms.of(
                query_KPD.shape[1], high - low, apart=not whole
            )
            if whole:
                # Of these rows there is nothing in other tiles.
                torch.baddbmm(weights_KPL, query_KPD, key_KLD.mT, beta=0, alpha=scale, out=weights_KPL)
                tiles.hide(weights_KPL, query, low)
                torch.softmax(weights_KPL, -1, out=weights_KPL)
                torch.bmm(gradient_KPD, value_KLD.mT, out=scores_KPL)
                if tiles.exact:
                    # Where what a query sees has overflowed, what it does not see has no number either.
                    tiles.hide(weights_KPL, query, low, 0.0)
                    tiles.hide(scores_KPL, query, low, 0.0)
                torch.ops.aten._softmax_backward_data.out(
                    scores_KPL, weights_KPL, -1, scores_KPL.dtype, grad_input=scores_KPL
                )
                if tiles.exact:
                    tiles.hide(scores_KPL, query, low, 0.0)
            else:
                torch.baddbmm(shift_KP1, query_KPD, key_KLD.mT, alpha=scale, out=weights_KPL)
                tiles.hide(weights_KPL, query, low)
                weights_KPL.exp_()
                torch.baddbmm(drift_KP1, gradient_KPD, value_KLD.mT, out=scores_KPL)
                scores_KPL.mul_(weights_KPL)
                if tiles.exact:
                    tiles.hide(scores_KPL, query, low, 0.0)
            value_total_KLD.baddbmm_(weights_KLP, gradient_KPD)
            key_total_KLD.baddbmm_(scores_KLP, query_KPD, alpha=scale)
            query_total_KPD.baddbmm_(scores_KPL, key_KLD, alpha=scale)
        for total_KLD, gradient_TKD in zip(of_tile[2:], of_key_gradients, strict=True):
            gradient_TKD[start:stop] = total_KLD.transpose(0, 1)
    return query_gradient_KRD


class _Rooms:
    """Room for the weights of a tile and for the gradients of its scores."""

    def __init__(self, workspace: Workspace, tiles: _Tiles, kv_heads: int) -> None:
        self.kv_heads = kv_heads
        self.rooms = workspace.empty(
            2, kv_heads * tiles.queries * tiles.groups * (tiles.keys + VECTOR)
        ).unbind()
        self.views: dict[tuple[int, int, int], list[Tensor]] = {}

    def of(self, rows: int, keys: int, *, apart: bool) -> list[Tensor]:
        """Both as [K, P, L], each followed by itself as [K, L, P]; `apart` for rows with room in between."""
        width = keys + VECTOR if apart and keys % STRIDE == 0 else keys
        if (rows, keys, width) not in self.views:
            shape = self.kv_heads, rows, width
            both = (room[: math.prod(shape)].view(shape)[..., :keys] for room in self.rooms)
            self.views[rows, keys, width] = [view for each in both for view in (each, each.mT)]
        return self.views[rows, keys, width]
