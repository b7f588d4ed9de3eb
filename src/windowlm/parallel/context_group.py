"""The processes that share one sequence, each with a part of its tokens in order."""

from dataclasses import dataclass, field
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from windowlm.parallel.parts import parts_of
from windowlm.parallel.processes import PATIENCE, nccl_options


@dataclass(eq=False)
class ContextGroup:
    """One process's view of those that share a sequence.

    Attributes:
        processes: torch's group of them; None stands for one process alone.
        shares: how the lengths of their parts relate; None for equal ones.
        bytes_sent: what this process has sent to others of keys, values and their gradients, as far as no
            compiled graph sends it.
    """

    processes: dist.ProcessGroup | None = None
    shares: tuple[float, ...] | None = None
    bytes_sent: int = field(default=0, init=False)

    @classmethod
    def of(cls, device: torch.device, size: int, shares: tuple[float, ...] | None = None) -> Self:
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
        return cls(group, shares)

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

    def parts(self, tokens: int) -> list[slice]:
        """Which of the tokens of a sequence each process has.

        Raises:
            SequenceLengthError: parts that should be equal cannot be.
            ValueError: the shares leave a process without tokens.
        """
        return parts_of(tokens, self.size, self.shares)

    def shard(self, tensor_BT: Tensor) -> Tensor:
        """This process's part of a tensor [B, T, ...].

        Raises:
            ValueError: as `parts`.
        """
        return tensor_BT[:, self.parts(tensor_BT.shape[1])[self.rank]]

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
