"""What each process sends to the others of its tokens, and where it puts what it gets; differentiable.

Sending begins with `TokenExchange.send` and ends with `receive`: what is computed in between overlaps with
it. In the backward pass the gradients travel back to the owners of the tokens, and what lies between the two
calls overlaps again.

Shapes: B rows, L own tokens, R places for tokens of others, N tokens sent, F features of any dimensions.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from windowlm.parallel.context_group import ContextGroup


@dataclass(frozen=True, eq=False)
class TokenExchange:
    """Which tokens travel between the processes of a group; each knows its own part of the whole.

    Attributes:
        group: the processes.
        batch: B.
        places: R.
        leaving: int64, own tokens that are sent, as `row * L + token`, those for the first process first.
        sent: how many go to each process.
        landing: int64, places of the tokens of others, as `row * R + place`, in the order of their owners.
        received: how many come from each process.
        idle: whether no process of the group sends anything, so that all may leave it out.
    """

    group: ContextGroup
    batch: int
    places: int
    leaving: Tensor
    sent: list[int]
    landing: Tensor
    received: list[int]
    idle: bool

    def moved(self, move: Callable[[Tensor], Tensor]) -> "TokenExchange":
        """The same with each tensor moved."""
        return TokenExchange(
            self.group,
            self.batch,
            self.places,
            move(self.leaving),
            self.sent,
            move(self.landing),
            self.received,
            self.idle,
        )

    def send(
        self, *tensors_BLF: Tensor, first: int = 0
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], "Travelling"]:
        """Begin to send; go on with the tensors that are returned, which collect the gradients of others.

        Args:
            tensors_BLF: [B, L, ...], of one dtype and one number of features.
            first: how many tokens at their beginning are read apart.

        Returns:
            The tensors, and their first tokens, whose gradients are added in place.
        """
        travelling = Travelling(self)
        if self.idle:
            return tensors_BLF, tuple(tensor[:, :first] for tensor in tensors_BLF), travelling
        sent: tuple[Tensor, ...] = _Send.apply(travelling, first, *tensors_BLF)  # type: ignore[no-untyped-call]
        return sent[: len(tensors_BLF)], sent[len(tensors_BLF) :], travelling

    def receive(self, own_BLF: tuple[Tensor, ...], travelling: "Travelling") -> tuple[Tensor, ...]:
        """Wait for what the others sent, [B, R, ...] of each tensor; zeros where nothing came.

        Args:
            own_BLF: what `send` returned.
            travelling: the same.
        """
        if self.idle:
            return tuple(own.new_zeros((own.shape[0], self.places, *own.shape[2:])) for own in own_BLF)
        received: tuple[Tensor, ...] = _Receive.apply(travelling, *own_BLF)  # type: ignore[no-untyped-call]
        return received


@dataclass(eq=False)
class Travelling:
    """One call's tokens on their way, and later their gradients on their way back."""

    exchange: TokenExchange
    _arriving: tuple[Tensor, dist.Work | None] | None = field(default=None, init=False)
    _leaving: Tensor | None = field(default=None, init=False)

    def begin(self, rows_NF: Tensor, *, back: bool) -> None:
        """Send rows to their destinations; `back`: to where they came from."""
        assert self._arriving is None
        there, here = self.exchange.sent, self.exchange.received
        sent, received = (here, there) if back else (there, here)
        # The sender's memory must last until all is sent.
        self._leaving = rows_NF
        self._arriving = self.exchange.group.deal(rows_NF, sent, received)

    @property
    def begun(self) -> bool:
        """Whether something is on its way."""
        return self._arriving is not None

    def end(self) -> Tensor:
        """Wait for what arrives."""
        assert self._arriving is not None
        rows_MF, work = self._arriving
        if work is not None:
            work.wait()
        self._arriving = self._leaving = None
        return rows_MF


class _Send(torch.autograd.Function):
    """The tensors as they are, and their first tokens; backward they add what the others' gradients say."""

    @staticmethod
    def forward(ctx: Any, travelling: Travelling, first: int, *tensors_BLF: Tensor) -> tuple[Tensor, ...]:
        ctx.travelling, ctx.first = travelling, first
        chosen_N = travelling.exchange.leaving
        travelling.begin(_rows(tensors_BLF, chosen_N), back=False)
        return (
            *(tensor.view_as(tensor) for tensor in tensors_BLF),
            *(tensor[:, :first] for tensor in tensors_BLF),
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        travelling: Travelling = ctx.travelling
        exchange = travelling.exchange
        gradients_BLF, of_first = gradients[: len(gradients) // 2], gradients[len(gradients) // 2 :]
        if not travelling.begun:
            # Nothing that this process received was of use, but others wait for its part.
            features = sum(gradient[0, 0].numel() for gradient in gradients_BLF)
            travelling.begin(gradients[0].new_zeros((sum(exchange.received), features)), back=True)
        returned_NF = travelling.end()
        totals_BLF = [gradient.clone(memory_format=torch.contiguous_format) for gradient in gradients_BLF]
        for total_BLF, first_BLF in zip(totals_BLF, of_first, strict=True):
            total_BLF[:, : ctx.first] += first_BLF
        sums = [total_BLF.flatten(0, 1) for total_BLF in totals_BLF]
        start = 0
        # One reader after the other, in which no token occurs twice: the order of sums is always the same.
        for count in exchange.sent:
            if count:
                rows = slice(start, start + count)
                parts = torch.split(returned_NF[rows], [total[0].numel() for total in sums], 1)
                for total, part in zip(sums, parts, strict=True):
                    total.index_add_(0, exchange.leaving[rows], part.reshape(count, *total.shape[1:]))
                start += count
        return None, None, *totals_BLF


class _Receive(torch.autograd.Function):
    """The tokens of others in their places; backward their gradients begin to travel."""

    @staticmethod
    def forward(ctx: Any, travelling: Travelling, *own_BLF: Tensor) -> tuple[Tensor, ...]:
        ctx.travelling = travelling
        exchange = travelling.exchange
        rows_MF = travelling.end()
        parts = torch.split(rows_MF, [own[0, 0].numel() for own in own_BLF], 1)
        placed = []
        for own, part in zip(own_BLF, parts, strict=True):
            shape = own.shape[2:]
            places = own.new_zeros((exchange.batch * exchange.places, *shape))
            places.index_copy_(0, exchange.landing, part.reshape(-1, *shape))
            placed.append(places.view(exchange.batch, exchange.places, *shape))
        return tuple(placed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients_BRF: Tensor) -> tuple[None, ...]:
        travelling: Travelling = ctx.travelling
        chosen_M = travelling.exchange.landing
        travelling.begin(_rows(gradients_BRF, chosen_M), back=True)
        return (None,) * (1 + len(gradients_BRF))


def _rows(tensors_BLF: tuple[Tensor, ...], chosen_N: Tensor) -> Tensor:
    """The chosen tokens of all tensors, features side by side; [N, F]."""
    return torch.cat(
        [
            tensor.flatten(0, 1).index_select(0, chosen_N).reshape(len(chosen_N), math.prod(tensor.shape[2:]))
            for tensor in tensors_BLF
        ],
        1,
    )
