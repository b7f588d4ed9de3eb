"""Attention by its formula, a block of queries at a time: any visibility, any scoring, memory linear in T.

What fused kernels lack: learned sinks, capped logits, keys in any order, and hidden keys and values of any
finite size, which are masked by selection and not by adding -inf, as that leaves NaN where a product
overflowed. The backward pass keeps nothing but its inputs: it computes the weights of each block again. The
two operators are opaque to torch.compile.

Shapes: B batch, T queries, S keys, H query heads, K key-value heads, G query heads a key-value head,
D head dimension, R rows of a block, C key-value heads of a block, Q queries of a block, P = G Q,
L keys that a block meets.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..differentiable import Computation, differentiable
from ..operator import empty_contiguous_gradients
from ..window import Places, Visibility, narrowed
from .autocast import without_autocast
from .banded_threads import use_threads
from .scaled_dot_product import Scoring

# What an operator takes for a number.
LARGEST = torch.iinfo(torch.int64).max
LONGEST_BLOCK, SHORTEST_BLOCK = 128, 16
# As long as the window up to here on a GPU, where a call takes longer than the numbers that it need not see.
LONGEST_BLOCK_ELSEWHERE = 512
# Scores of a block: enough to outweigh the calls, few enough for the caches of a CPU.
SCORES_ON_CPU, SCORES_ELSEWHERE = 2**20, 2**25
# Up to here rows are taken together on a CPU; products over rows and heads copy their keys.
FEW_SCORES = 2**16


def attend(
    query_BTHD: Tensor,
    key_BSKD: Tensor,
    value_BSKD: Tensor,
    visibility: Visibility,
    scoring: Scoring,
    places: Places | None = None,
) -> Tensor:
    """Attention [B, T, H, D].

    Args:
        query_BTHD: queries.
        key_BSKD: keys.
        value_BSKD: values.
        visibility: what is visible.
        scoring: how scores become weights.
        places: where queries and keys stand, as these are in any order; None: as `visibility` says.
    """
    queries, keys, device = query_BTHD.shape[1], key_BSKD.shape[1], query_BTHD.device
    behind = ahead = None
    if places is None:
        places = visibility.places(queries, keys, device)
        if not visibility.separate_keys:
            behind, ahead = visibility.reach
            if visibility.sinks:
                behind, ahead = None, 0 if visibility.causal else None
    seed = (
        torch.randint(2**62, (), device="cpu")
        if scoring.dropout
        else torch.zeros((), dtype=torch.int64, device="cpu")
    )
    return _attention(
        query_BTHD, key_BSKD, value_BSKD, scoring.sink_logits, *places, seed,
        narrowed(visibility.window, LARGEST), visibility.causal, min(visibility.sinks, LARGEST),
        behind, ahead, scoring.scale, scoring.dropout, scoring.logit_cap,
    )  # fmt: skip


class _Block(NamedTuple):
    """What is computed at once: rows of the batch, key-value heads, queries and the keys in their reach."""

    rows: slice
    kv_heads: slice
    heads: slice
    queries: slice
    keys: slice

    def rows_of(self, tokens_BTHD: Tensor) -> Tensor:
        """Its queries, grouped by key-value head, [R, C, P, D]."""
        kv_heads = self.kv_heads.stop - self.kv_heads.start
        return rearrange(
            tokens_BTHD[self.rows, self.queries, self.heads], "r q (c g) d -> r c (g q) d", c=kv_heads
        )

    def write(self, tokens_BTHD: Tensor, rows_RCPD: Tensor) -> None:
        """Put queries where `rows_of` takes them from."""
        target = tokens_BTHD[self.rows, self.queries, self.heads]
        target.copy_(rearrange(rows_RCPD, "r c (g q) d -> r q (c g) d", q=target.shape[1]))

    def keys_of(self, tokens_BSKD: Tensor) -> Tensor:
        """Its keys or values, a view [R, C, L, D]."""
        return tokens_BSKD[self.rows, self.keys, self.kv_heads].transpose(1, 2)


class _Call:
    """A call's tensors in the dtype of the computation, and how they are computed."""

    def __init__(
        self,
        query_BTHD: Tensor,
        key_BSKD: Tensor,
        value_BSKD: Tensor,
        sink_logits_H: Tensor | None,
        query_positions: Tensor,
        key_positions: Tensor,
        query_documents: Tensor | None,
        key_documents: Tensor | None,
        seed: Tensor,
        window: int | None,
        causal: bool,
        sinks: int,
        behind: int | None,
        ahead: int | None,
        scale: float,
        dropout: float,
        logit_cap: float | None,
    ) -> None:
        use_threads()
        self.dtype = torch.promote_types(query_BTHD.dtype, torch.float32)
        self.query_BTHD, self.key_BSKD, self.value_BSKD = (
            tensor.to(self.dtype) for tensor in (query_BTHD, key_BSKD, value_BSKD)
        )
        self.sink_H = None if sink_logits_H is None else sink_logits_H.to(self.dtype)
        self.places = Places(query_positions, key_positions, query_documents, key_documents)
        self.visibility = Visibility(window, causal, sinks)
        self.behind, self.ahead = behind, ahead
        self.scale, self.dropout, self.logit_cap = scale, dropout, logit_cap
        self.generator = torch.Generator(query_BTHD.device)
        if dropout:
            self.generator.manual_seed(int(seed))

    def blocks(self) -> Iterator[tuple[_Block, Tensor]]:
        """The blocks, and what is hidden in them, bool [R or 1, 1, 1, Q, L]; always in one order."""
        (batch, queries, heads), (keys, kv_heads) = self.query_BTHD.shape[:3], self.key_BSKD.shape[1:3]
        groups, on_cpu = heads // kv_heads, self.query_BTHD.device.type == "cpu"
        room = SCORES_ON_CPU if on_cpu else SCORES_ELSEWHERE
        length, longest = keys, LONGEST_BLOCK
        if self.behind is not None and self.ahead is not None:
            reach = self.behind + self.ahead
            if not on_cpu:
                longest = max(longest, min(reach, LONGEST_BLOCK_ELSEWHERE))
            length = min(keys, reach + longest)
        block = min(queries, max(SHORTEST_BLOCK, min(longest, room // (groups * length))))
        together = max(1, min(kv_heads, room // (groups * block * length)))
        rows = 1
        if together == kv_heads:
            rows = max(1, min(batch, (FEW_SCORES if on_cpu else room) // (heads * block * length)))
        of_rows = any(places is not None and len(places) > 1 for places in self.places)
        hidden = None
        for start in range(0, queries, block):
            stop = min(start + block, queries)
            of_queries, of_keys = slice(start, stop), self._reach(start, stop, keys - queries, keys)
            for row in range(0, batch, rows):
                of_batch = slice(row, min(row + rows, batch))
                if of_rows or row == 0:
                    hidden = self._hidden(of_batch, of_queries, of_keys)
                assert hidden is not None
                for head in range(0, kv_heads, together):
                    of_kv_heads = slice(head, min(head + together, kv_heads))
                    of_heads = slice(of_kv_heads.start * groups, of_kv_heads.stop * groups)
                    yield _Block(of_batch, of_kv_heads, of_heads, of_queries, of_keys), hidden

    def _reach(self, start: int, stop: int, shift: int, keys: int) -> slice:
        """The keys that some of the queries may see."""
        first = 0 if self.behind is None else max(0, start + shift - self.behind)
        last = keys if self.ahead is None else min(keys, stop + shift + self.ahead)
        return slice(first, last)

    def _hidden(self, rows: slice, queries: slice, keys: slice) -> Tensor:
        def part(tensor: Tensor | None, tokens: slice) -> Tensor | None:
            return None if tensor is None else tensor[rows if len(tensor) > 1 else slice(None), tokens]

        query_positions, key_positions = (
            part(self.places.query_positions, queries),
            part(self.places.key_positions, keys),
        )
        assert query_positions is not None
        assert key_positions is not None
        places = Places(
            query_positions,
            key_positions,
            part(self.places.query_documents, queries),
            part(self.places.key_documents, keys),
        )
        return ~self.visibility.between(places)[:, None, None]

    def weights(self, block: _Block, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Softmax weights [R, C, P, L], that of the learned sink as one more column; and the scores' tanh."""
        scores = (block.rows_of(self.query_BTHD) * self.scale) @ block.keys_of(self.key_BSKD).mT
        bent = None
        if self.logit_cap is not None:
            bent = scores.div_(self.logit_cap).tanh_()
            scores = bent * self.logit_cap
        by_query(scores, hidden).masked_fill_(hidden, -torch.inf)
        blind = hidden.all(-1, keepdim=True)
        if self.sink_H is not None:
            scores = F.pad(scores, (0, 1))
            of_group = self.sink_H[block.heads].view(-1, scores.shape[2] // hidden.shape[-2], 1)
            by_query(scores, hidden)[..., -1] = of_group
        weights = torch.softmax(scores, -1, out=scores)
        by_query(weights, hidden).masked_fill_(blind, 0.0)
        return weights, bent

    def kept(self, weights: Tensor) -> Tensor | None:
        """What dropout multiplies the weights of the next block by; None where nothing is dropped."""
        if not self.dropout:
            return None
        share = 1 - self.dropout
        return torch.empty_like(weights).bernoulli_(share, generator=self.generator).div_(share)


def by_query(of_rows_RCPL: Tensor, hidden: Tensor) -> Tensor:
    """A view [R, C, G, Q, L] of what stands in rows [R, C, P, L]."""
    return rearrange(of_rows_RCPL, "r c (g q) l -> r c g q l", q=hidden.shape[-2])


def _attend(query_BTHD: Tensor, *others: Any) -> Tensor:
    output_BTHD = torch.empty(query_BTHD.shape, dtype=query_BTHD.dtype, device=query_BTHD.device)
    with without_autocast(query_BTHD.device):
        call = _Call(query_BTHD, *others)
        for block, hidden in call.blocks():
            weights, _ = call.weights(block, hidden)
            weights = weights[..., : hidden.shape[-1]]
            kept = call.kept(weights)
            if kept is not None:
                weights = kept.mul_(weights)
            block.write(output_BTHD, weights @ block.keys_of(call.value_BSKD))
    return output_BTHD


def _attend_backward(
    gradient_BTHD: Tensor,
    query_BTHD: Tensor,
    key_BSKD: Tensor,
    value_BSKD: Tensor,
    sink_logits_H: Tensor | None,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with without_autocast(query_BTHD.device):
        call = _Call(query_BTHD, key_BSKD, value_BSKD, sink_logits_H, *others)
        gradient_BTHD = gradient_BTHD.to(call.dtype)
        query_gradient, key_gradient, value_gradient = (
            torch.zeros(tensor.shape, dtype=call.dtype, device=tensor.device)
            for tensor in (query_BTHD, key_BSKD, value_BSKD)
        )
        sink_gradient_H = gradient_BTHD.new_zeros(query_BTHD.shape[2])
        for block, hidden in call.blocks():
            weights, bent = call.weights(block, hidden)
            length = hidden.shape[-1]
            gradient = block.rows_of(gradient_BTHD)
            kept = call.kept(weights[..., :length])
            used = weights[..., :length] if kept is None else weights[..., :length] * kept
            block.keys_of(value_gradient).add_(used.mT @ gradient)
            scores_gradient = gradient @ block.keys_of(call.value_BSKD).mT
            if kept is not None:
                scores_gradient.mul_(kept)
            # Before it meets a weight of zero: what is hidden may have overflowed.
            by_query(scores_gradient, hidden).masked_fill_(hidden, 0.0)
            if sink_logits_H is not None:
                scores_gradient = F.pad(scores_gradient, (0, 1))
            torch.ops.aten._softmax_backward_data.out(
                scores_gradient, weights, -1, call.dtype, grad_input=scores_gradient
            )
            if sink_logits_H is not None:
                sink_gradient_H[block.heads] += (
                    by_query(scores_gradient, hidden)[..., -1].sum((0, 3)).flatten()
                )
                scores_gradient = scores_gradient[..., :length]
            if bent is not None:
                by_query(bent, hidden).masked_fill_(hidden, 0.0)
                scores_gradient = scores_gradient * (1 - bent.square_())
            query = block.rows_of(call.query_BTHD) * call.scale
            block.keys_of(key_gradient).add_(scores_gradient.mT @ query)
            block.write(query_gradient, (scores_gradient @ block.keys_of(call.key_BSKD)).mul_(call.scale))
        return (
            query_gradient.to(query_BTHD.dtype),
            key_gradient.to(key_BSKD.dtype),
            value_gradient.to(value_BSKD.dtype),
            sink_gradient_H if sink_logits_H is None else sink_gradient_H.to(sink_logits_H.dtype),
        )


def _empty_output(query_BTHD: Tensor, *_: object) -> Tensor:
    return query_BTHD.new_empty(query_BTHD.shape)


def _empty_gradients(
    gradient_BTHD: Tensor,
    query_BTHD: Tensor,
    key_BSKD: Tensor,
    value_BSKD: Tensor,
    sink_logits_H: Tensor | None,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(query_BTHD.dtype, torch.float32)
    return (
        *empty_contiguous_gradients(gradient_BTHD, query_BTHD, key_BSKD, value_BSKD),
        query_BTHD.new_empty(
            query_BTHD.shape[2], dtype=dtype if sink_logits_H is None else sink_logits_H.dtype
        ),
    )


# Of `_Call`.
_ARGUMENTS = (
    "Tensor query_BTHD, Tensor key_BSKD, Tensor value_BSKD, Tensor? sink_logits_H, Tensor query_positions, "
    "Tensor key_positions, Tensor? query_documents, Tensor? key_documents, Tensor seed, SymInt? window, "
    "bool causal, SymInt sinks, SymInt? behind, SymInt? ahead, float scale, float dropout, float? logit_cap"
)
_attention = differentiable(
    "banded",
    __name__,
    _ARGUMENTS,
    Computation(_attend, _empty_output),
    Computation(_attend_backward, _empty_gradients),
    keeps_outputs=False,
    gradients=4,
)
