"""The CPU's way over the band: batched matrix products over blocks of queries and the keys in their reach.

A product takes neighbouring blocks of one head where they share a mask, else one block of all heads. Keys and
values are read in place through strided views, the scores of a product stay in the processor's caches, and
the backward pass keeps nothing but query, key and value: it computes the weights again. The two operators are
opaque to torch.compile. `banded_blocks` computes the same by `blockwise`.

Shapes: B batch, T queries, S keys, K key-value heads, G query heads a key-value head, D head dimension,
Q queries a block, L keys in reach of a block, C blocks of a run, P = Q G rows of a block.
"""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from ..differentiable import Computation, differentiable
from ..window import Visibility
from .banded_plan import LONGEST_RUN, Block, Plan, Run, blocks_of, keys_met, make_plan
from .banded_threads import Share, holds_nan, in_parallel, shares_of, zeros
from .banded_workspace import Workspace
from .scaled_dot_product import Scoring

# Of all heads that are computed together; more leave the caches.
SCORES = 2**21


def attend(
    query_BTHD: Tensor,
    key_BSKD: Tensor,
    value_BSKD: Tensor,
    visibility: Visibility,
    scoring: Scoring,
) -> Tensor:
    """Attention where the keys are in order, with sinks or documents, not both; returns [B, T, H, D]."""
    queries, keys = query_BTHD.shape[1], key_BSKD.shape[1]
    plan = visibility.once(
        "banded matmul", lambda: make_plan(visibility, queries, keys), sizes=(queries, keys)
    )
    scale, dropout = scoring.scale, scoring.dropout
    seed = (
        torch.randint(2**62, (), device="cpu")
        if dropout
        else torch.zeros((), dtype=torch.int64, device="cpu")
    )
    return _attention(query_BTHD, key_BSKD, value_BSKD, *plan, scale, dropout, seed)


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
        exact: bool,
    ) -> None:
        dtype = torch.promote_types(query_THD.dtype, torch.float32)
        self.query_THD, self.key_SKD, self.value_SKD = (
            tensor.to(dtype) for tensor in (query_THD, key_SKD, value_SKD)
        )
        self.kv_heads, self.scale, self.dtype, self.exact = key_SKD.shape[1], scale, dtype, exact
        of_start = query_THD.shape[1] // self.kv_heads * plan.hidden[:1].numel()
        room = max(query_THD.shape[1] * _scores(plan), of_start, LONGEST_RUN)
        workspace = Workspace(dtype)
        self.scores, self.scores_gradient = workspace.empty(room), workspace.empty(room)
        self.drop = drop
        self.factors = workspace.empty(0 if drop is None else room)

    def blocks(self, plan: Plan, share: Share) -> Iterable[Block | Run]:
        """The blocks of the share."""
        groups = self.query_THD.shape[1] // self.kv_heads
        return blocks_of(plan, share, len(self.query_THD), self.kv_heads, groups, self.dtype)

    def weights(self, block: Block | Run) -> Tensor:
        """Softmax weights [K or C, P, L] of a block or run; they live until the next call."""
        query_KPD, key_KLD = block.rows(self.query_THD, self.kv_heads), block.keys_of(self.key_SKD)
        shape = (*query_KPD.shape[:2], key_KLD.shape[1])
        scores_KPL = self.scores[: shape[0] * shape[1] * shape[2]].view(shape)
        _by_query(scores_KPL, block).copy_(block.bias[:, None])
        torch.baddbmm(scores_KPL, query_KPD, key_KLD.mT, alpha=self.scale, out=scores_KPL)
        self.hide(scores_KPL, block, -torch.inf)
        torch.softmax(scores_KPL, -1, out=scores_KPL)
        # Where what a query sees has overflowed, it gives no number to what it does not see either.
        self.hide(scores_KPL, block, 0.0)
        if block.blind is not None:
            _by_query(scores_KPL, block).masked_fill_(block.blind[:, None], 0.0)
        return scores_KPL

    def hide(self, scores_KPL: Tensor, block: Block | Run, value: float) -> None:
        """Where asked to be exact, write over what is hidden: added to infinity, -inf leaves NaN."""
        if self.exact:
            _by_query(scores_KPL, block).masked_fill_(block.bias[:, None] == -torch.inf, value)
            if block.blind is not None:
                # Their bias hides nothing, as a softmax of -inf alone is no number.
                _by_query(scores_KPL, block).masked_fill_(block.blind[:, None], 0.0)

    def dropout_factors(self, block: Block | Run, weights_KPL: Tensor) -> Tensor | None:
        """What dropout multiplies the weights of the next block by; None where nothing is dropped."""
        if self.drop is None:
            return None
        room_KPL = self.factors[: weights_KPL.numel()].view_as(weights_KPL)
        return self.drop.factors(room_KPL, block.of_heads(self.drop.generators))


def _by_query(scores_KPL: Tensor, block: Block | Run) -> Tensor:
    """A view [K or C, Q, G, L], as all query heads share a mask."""
    queries, keys = block.bias.shape
    return scores_KPL.view(len(scores_KPL), queries, -1, keys)


class _Drop:
    """Draws of dropout for some heads of a row: the backward pass draws again what the forward drew.

    Each head has a generator of its own, so that the draws do not depend on how threads share the heads.
    Sixteen random bits a weight, as drawing them takes a sixth of the time of `bernoulli_`; the probability
    is rounded to a multiple of 2^-16, and the weights kept are scaled by what is then expected.
    """

    STEPS = 2**16

    def __init__(self, probability: float, seeds: range) -> None:
        self.dropped = min(round(probability * self.STEPS), self.STEPS - 1)
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]

    def factors(self, room_KPL: Tensor, generators: list[torch.Generator]) -> Tensor:
        """Fill the room with 0 for a dropped weight and the inverse of the share kept for others."""
        per_head = room_KPL.numel() // len(generators)
        words = torch.empty(len(generators), -(-per_head // 4), dtype=torch.int64, device="cpu")
        for words_of_head, generator in zip(words, generators, strict=True):
            words_of_head.random_(-(2**63), None, generator=generator)
        bits_KPL = words.view(torch.int16)[:, :per_head].reshape(room_KPL.shape)
        torch.ge(bits_KPL, self.dropped - self.STEPS // 2, out=room_KPL)
        return room_KPL.mul_(self.STEPS / (self.STEPS - self.dropped))


def _drop(dropout: float, seed: Tensor, index: int, kv_heads: slice, all_kv_heads: int) -> _Drop | None:
    if not dropout:
        return None
    first = int(seed) + index * all_kv_heads
    return _Drop(dropout, range(first + kv_heads.start, first + min(kv_heads.stop, all_kv_heads)))


def _scores(plan: Plan) -> int:
    """Scores of a block, of one query head."""
    return len(plan.common) * (plan.sinks + plan.common.shape[1])


def _shares(query_BTHD: Tensor, key_BSKD: Tensor, plan: Plan, dropout: float) -> list[Share]:
    groups = query_BTHD.shape[2] // key_BSKD.shape[2]
    most_heads = max(1, SCORES // (groups * _scores(plan)))
    return shares_of(query_BTHD, key_BSKD, divisible=not dropout, most_heads=most_heads)


def _like(heads_BTHD: Tensor, plan: Plan) -> Tensor:
    """Contiguous room for a result; zeros where blocks may be passed over."""
    if plan.blind.numel():
        return zeros(heads_BTHD.shape, heads_BTHD.dtype)
    return torch.empty(heads_BTHD.shape, dtype=heads_BTHD.dtype, device="cpu")


def fill_outputs(
    output_BTHD: Tensor,
    query_BTHD: Tensor,
    key_BSKD: Tensor,
    value_BSKD: Tensor,
    plan: Plan,
    scale: float,
    dropout: float,
    seed: Tensor,
) -> None:
    """Write the outputs of the queries, the last T of the S keys; those that see nothing are passed over."""

    def fill(share: Share, exact: bool) -> None:
        row = _Row(
            query_BTHD[share.row, :, share.heads],
            key_BSKD[share.row, :, share.kv_heads],
            value_BSKD[share.row, :, share.kv_heads],
            plan,
            scale,
            _drop(dropout, seed, share.row, share.kv_heads, key_BSKD.shape[2]),
            exact,
        )
        output_THD = output_BTHD[share.row, :, share.heads]
        for block in row.blocks(plan, share):
            weights_KPL = row.weights(block)
            factors_KPL = row.dropout_factors(block, weights_KPL)
            if factors_KPL is not None:
                weights_KPL.mul_(factors_KPL)
            block.write(output_THD, torch.bmm(weights_KPL, block.keys_of(row.value_SKD)))

    shares = _shares(query_BTHD, key_BSKD, plan, dropout)
    in_parallel(partial(fill, exact=False), shares)
    if holds_nan(output_BTHD):
        # The product with a hidden key may have overflowed; numbers that did not are computed the same again.
        in_parallel(partial(fill, exact=True), shares)


def add_gradients(
    gradients: tuple[Tensor, Tensor, Tensor],
    gradient_BTHD: Tensor,
    query_BTHD: Tensor,
    key_BSKD: Tensor,
    value_BSKD: Tensor,
    plan: Plan,
    scale: float,
    dropout: float,
    seed: Tensor,
    *,
    exact: bool = False,
) -> None:
    """Write the gradients of the queries, and add those of keys and values, in the computation's dtype."""
    query_gradient_BTHD = gradients[0]

    def fill(share: Share) -> tuple[slice, list[Tensor]] | None:
        row = _Row(
            query_BTHD[share.row, :, share.heads],
            key_BSKD[share.row, :, share.kv_heads],
            value_BSKD[share.row, :, share.kv_heads],
            plan,
            scale,
            _drop(dropout, seed, share.row, share.kv_heads, key_BSKD.shape[2]),
            exact,
        )
        gradient_THD = gradient_BTHD[share.row, :, share.heads].to(row.dtype)
        query_gradient_THD = query_gradient_BTHD[share.row, :, share.heads]
        keys = slice(None) if share.parts == 1 else keys_met(plan, share, len(row.query_THD))
        totals = [total_BSKD[share.row, keys, share.kv_heads] for total_BSKD in gradients[1:]]
        key_gradient_SKD, value_gradient_SKD = (
            totals if share.parts == 1 else [_by_head(total.new_zeros, total) for total in totals]
        )
        for block in row.blocks(plan, share):
            own_keys = block.shifted(keys.start or 0)
            weights_KPL = row.weights(block)
            gradient_KPD = block.rows(gradient_THD, row.kv_heads)
            query_KPD = block.rows(row.query_THD, row.kv_heads)
            key_KLD, value_KLD = block.keys_of(row.key_SKD), block.keys_of(row.value_SKD)
            scores_gradient_KPL = row.scores_gradient[: weights_KPL.numel()].view_as(weights_KPL)
            factors_KPL = row.dropout_factors(block, weights_KPL)
            kept_KPL = weights_KPL
            if factors_KPL is not None:
                kept_KPL = torch.mul(weights_KPL, factors_KPL, out=scores_gradient_KPL)
            own_keys.add_to_keys(value_gradient_SKD, kept_KPL.mT, gradient_KPD)
            torch.bmm(gradient_KPD, value_KLD.mT, out=scores_gradient_KPL)
            if factors_KPL is not None:
                scores_gradient_KPL.mul_(factors_KPL)
            row.hide(scores_gradient_KPL, block, 0.0)
            torch.ops.aten._softmax_backward_data.out(
                scores_gradient_KPL, weights_KPL, -1, row.dtype, grad_input=scores_gradient_KPL
            )
            row.hide(scores_gradient_KPL, block, 0.0)
            own_keys.add_to_keys(key_gradient_SKD, scores_gradient_KPL.mT, query_KPD, scale)
            block.write(query_gradient_THD, torch.bmm(scores_gradient_KPL, key_KLD).mul_(scale))
        return None if share.parts == 1 else (keys, [key_gradient_SKD, value_gradient_SKD])

    shares = _shares(query_BTHD, key_BSKD, plan, dropout)
    for share, own in zip(shares, in_parallel(fill, shares), strict=True):
        if own is not None:  # in the order of the parts, so that sums repeat bit by bit
            keys, added = own
            for total_BSKD, added_SKD in zip(gradients[1:], added, strict=True):
                total_BSKD[share.row, keys, share.kv_heads] += added_SKD


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
    fill_outputs(output_BTHD, query_BTHD, key_BSKD, value_BSKD, plan, scale, dropout, seed)
    return output_BTHD


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
    dtype = torch.promote_types(query_BTHD.dtype, torch.float32)
    given = gradient_BTHD, query_BTHD, key_BSKD, value_BSKD
    for exact in (False, True):
        key_gradient_BSKD, value_gradient_BSKD = (
            _by_head(partial(zeros, dtype=dtype), key_BSKD) for _ in range(2)
        )
        gradients = _like(query_BTHD, plan), key_gradient_BSKD, value_gradient_BSKD
        add_gradients(gradients, *given, plan, scale, dropout, seed, exact=exact)
        if not holds_nan(gradients[0]):
            break
    return gradients[0], gradients[1].to(key_BSKD.dtype), gradients[2].to(key_BSKD.dtype)


def _by_head(make: Callable[[torch.Size], Tensor], keys_BSKD: Tensor) -> Tensor:
    """Room for the gradient of keys, with B or without, that lies in memory as [B, K, S, D].

    So the keys of blocks that do not overlap lie beside each other, and torch multiplies many in one call.
    """
    return make(keys_BSKD.transpose(-3, -2).shape).transpose(-3, -2)


def _empty_output(query_BTHD: Tensor, *_: object) -> Tensor:
    return query_BTHD.new_empty(query_BTHD.shape)


def _empty_gradients(
    gradient_BTHD: Tensor, query_BTHD: Tensor, key_BSKD: Tensor, value_BSKD: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    of_key, of_value = (_by_head(tensor.new_empty, tensor) for tensor in (key_BSKD, value_BSKD))
    return _empty_output(query_BTHD), of_key, of_value


_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor blocks, Tensor common, Tensor hidden, Tensor blind, "
    "SymInt sinks, float scale, float dropout, Tensor seed"
)
_attention = differentiable(
    "banded",
    __name__,
    _ARGUMENTS,
    Computation(_attend, _empty_output),
    Computation(_attend_backward, _empty_gradients),
    keeps_outputs=False,
)
