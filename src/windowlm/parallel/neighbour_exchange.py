"""The last tokens of each part, sent to the process behind it; differentiable, and within a compiled graph.

`NeighbourExchange.send` begins and `receive` ends it: what is computed in between overlaps with it. In the
backward pass, which goes the other way, `receive` sends the gradients back, and `send` waits for them.
Tokens that are chosen by documents go by `TokenExchange`, whose numbers differ from batch to batch.

Shapes: B rows, L own tokens, R tokens of a neighbour, M numbers of all rows that travel.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from windowlm.parallel.context_group import ContextGroup

NeighboursTokens = tuple[Tensor, Tensor]  # what arrives, and what its gradients come back as


@dataclass(frozen=True, eq=False)
class NeighbourExchange:
    """Each process of a group sends its last tokens to the next.

    Attributes:
        group: the processes.
        rank, size: which of them this is, of how many; name: theirs. Graphs are compiled for them.
        tokens: how many each sends, R; at most those of a part.
    """

    group: ContextGroup
    rank: int
    size: int
    name: str
    tokens: int

    @classmethod
    def of(cls, group: ContextGroup, tokens: int) -> Self:
        """Between the processes of a group."""
        return cls(group, group.rank, group.size, group.name, tokens)

    @property
    def received(self) -> int:
        """How many tokens come from the process before; none to the first."""
        return self.tokens if self.rank else 0

    def send(self, *tensors_BLF: Tensor) -> NeighboursTokens:
        """Begin to send the last tokens of tensors [B, L, ...], L from R on, of one dtype."""
        start = tensors_BLF[0].shape[1] - self.tokens
        last_M = torch.cat([tensor[:, start:].flatten() for tensor in tensors_BLF])
        sent: NeighboursTokens = _Send.apply(self, last_M)  # type: ignore[no-untyped-call]
        return sent

    def receive(self, own_BLF: tuple[Tensor, ...], sent: NeighboursTokens) -> tuple[Tensor, ...]:
        """Wait for what the process before sent, [B, R, ...] of each tensor; R is 0 for the first process.

        Each process must make use of what it gets, be it empty, for gradients to travel back.
        """
        sizes = [tensor[:, : self.tokens].numel() for tensor in own_BLF]
        first_M: Tensor = _Receive.apply(self, *sent, sum(sizes))  # type: ignore[no-untyped-call]
        parts_M = torch.split(first_M, sizes if self.received else [0 for _ in sizes])
        return tuple(
            part_M.view(own.shape[0], self.received, *own.shape[2:])
            for own, part_M in zip(own_BLF, parts_M, strict=True)
        )

    def begin(self, numbers_M: Tensor, count: int, *, back: bool) -> Tensor:
        """Begin to send numbers to the next process, or back, and to receive `count` from the other; at the
        ends there is none.
        """
        to, source = (self.rank - 1, self.rank + 1) if back else (self.rank + 1, self.rank - 1)
        if not 0 <= to < self.size:
            numbers_M = numbers_M[:0]
        sent = [numbers_M.shape[0] if other == to else 0 for other in range(self.size)]
        received = [count if other == source else 0 for other in range(self.size)]
        if not torch.compiler.is_compiling():
            self.group.bytes_sent += numbers_M.nbytes
        arriving_M: Tensor = torch.ops._c10d_functional.all_to_all_single(
            numbers_M, received, sent, self.name
        )
        return arriving_M


class _Send(torch.autograd.Function):
    """Begins to send; backward it waits for the gradients.

    These are on their way as the gradient of a tensor without contents, as many as come back.
    """

    @staticmethod
    def forward(ctx: Any, exchange: NeighbourExchange, last_M: Tensor) -> NeighboursTokens:
        count = last_M.shape[0]
        ctx.returning = exchange.rank < exchange.size - 1
        arriving_M = exchange.begin(last_M, count, back=False)
        ctx.mark_non_differentiable(arriving_M)
        return arriving_M, last_M.new_empty(count if ctx.returning else 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, returning_M: Tensor) -> tuple[None, Tensor | None]:
        returned_M = torch.ops._c10d_functional.wait_tensor(returning_M)
        # Zeros would be added to the gradients of all tokens.
        return None, returned_M if ctx.returning else None


class _Receive(torch.autograd.Function):
    """Waits for what was sent; backward it begins to send the gradients."""

    @staticmethod
    def forward(
        ctx: Any, exchange: NeighbourExchange, arriving_M: Tensor, returning_M: Tensor, count: int
    ) -> Tensor:
        ctx.exchange, ctx.count = exchange, count
        first_M: Tensor = torch.ops._c10d_functional.wait_tensor(arriving_M)
        return first_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_M: Tensor) -> tuple[None, None, Tensor, None]:
        exchange: NeighbourExchange = ctx.exchange
        return None, None, exchange.begin(gradient_M.contiguous(), ctx.count, back=True), None
