"""The processes that share one sequence, each with an equal part of its tokens in order."""

from dataclasses import dataclass, field
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from windowlm.parallel.processes import PATIENCE, nccl_options


class SequenceLengthError(ValueError):
    """A sequence that cannot be cut into equal parts.

    Args:
        tokens: its length.
        processes: how many parts there should be.
    """

    def __init__(self, tokens: int, processes: int) -> None:
        # What an exception is made of again, in a process that is told of it.
        super().__init__(tokens, processes)

    def __str__(self) -> str:
        tokens, processes = self.args
        good = max(tokens // processes, 1) * processes
        return (
            f"sequence_length={tokens}: the sequence is cut over {processes} processes, and a multiple of "
            f"{processes} is allowed; try sequence_length={good}"
        )


@dataclass(eq=False)
class ContextGroup:
    """One process's view of those that share a sequence.

    Attributes:
        processes: torch's group of them; None stands for one process alone.
        bytes_sent: what this process has sent to others of keys, values and their gradients, as far as no
            compiled graph sends it.
    """

    processes: dist.ProcessGroup | None = None
    bytes_sent: int = field(default=0, init=False)

    @classmethod
    def of(cls, device: torch.device, size: int) -> Self:
        """This process's, where all processes form groups of so many neighbours, the rows of a mesh.

        Its connections are its own: behind those of all processes each exchange would wait until the
        gradients that are on their way have arrived.
        """
        backend, options = "gloo", None
        if device.type == "cuda":
            backend, options = "nccl", nccl_options(high_priority=True)
        group, _ = dist.new_subgroups(  # type: ignore[no-untyped-call]
            size, timeout=PATIENCE, backend=backend, pg_options=options
        )
        return cls(group)

    @property
    def size(self) -> int:
        """How many processes share the sequence."""
        return 1 if self.processes is None else dist.get_world_size(self.processes)

    @property
    def rank(self) -> int:
        """Which part is this process's, counted from the start of the sequence."""
        return 0 if self.processes is None else dist.get_rank(self.processes)

    @property
    def name(self) -> str:
        """By which operations of compiled graphs find the processes."""
        assert self.processes is not None
        return self.processes.group_name

    def shard_length(self, tokens: int) -> int:
        """Tokens of each part of a sequence of `tokens`.

        Raises:
            SequenceLengthError: the parts would not be equal.
        """
        if tokens % self.size:
            raise SequenceLengthError(tokens, self.size)
        return tokens // self.size

    def shard(self, tensor_BT: Tensor) -> Tensor:
        """This process's part of a tensor [B, T, ...].

        Raises:
            SequenceLengthError: the parts would not be equal.
        """
        length = self.shard_length(tensor_BT.shape[1])
        return tensor_BT[:, self.rank * length : (self.rank + 1) * length]

    def deal(self, rows_NF: Tensor, sent: list[int], received: list[int]) -> tuple[Tensor, dist.Work | None]:
        """Begin to send rows to each process and to receive theirs.

        Args:
            rows_NF: what is sent, that for the first process first.
            sent, received: rows for and from each process.

        Returns:
            Where the rows will be, those of the first process first, and what to wait for before they are.
        """
        into_MF = rows_NF.new_empty((sum(received), *rows_NF.shape[1:]))
        self.bytes_sent += rows_NF.nbytes
        work = dist.all_to_all_single(
            into_MF, rows_NF.contiguous(), received, sent, group=self.processes, async_op=True
        )
        return into_MF, work

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum over the processes, on each of them."""
        if self.processes is None:
            return tensor
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.processes)
        return total
