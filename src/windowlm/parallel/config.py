"""Settings of work by several processes."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from windowlm.parallel.parts import told


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the processes of a run share the work; one process does all of it, which its plan says.

    Args:
        kind: ``ddp`` gives each process rows of the batch and a whole model, ``fsdp2`` rows and a part of the
            model (Zhao et al. 2023, arXiv:2304.11277), ``context`` a part of each sequence.
        context_processes: of ``context``, how many share a sequence; with more processes several such groups
            share the batch. Null for as many as there are shares, or all.
        context_shares: of ``context``, how the parts of a sequence relate, a number above 0 for each process
            that shares it, in order and the same for each group, as GPUs differ and each step waits for the
            slowest; lengths are rounded (`parts.parts_of`). Null for equal parts.
        blocks_at_once: of ``fsdp2``, how many blocks' weights and gradients a process holds whole at once:
            more are faster, fewer take less memory. Null for a quarter of them, or one with checkpointed
            activations.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    kind: Literal["ddp", "fsdp2", "context"] = "ddp"
    context_processes: int | None = None
    context_shares: tuple[float, ...] | None = None
    blocks_at_once: int | None = None

    def __post_init__(self) -> None:
        if self.blocks_at_once is not None and self.blocks_at_once < 1:
            raise ValueError(
                f"blocks_at_once={self.blocks_at_once}: must be at least 1, or null for a quarter of them; "
                "try blocks_at_once=null"
            )
        if self.blocks_at_once is not None and self.kind != "fsdp2":
            raise ValueError(
                f"blocks_at_once={self.blocks_at_once}: parallel={self.kind} gathers no weights; "
                "try blocks_at_once=null"
            )
        if self.context_processes is not None and self.context_processes < 1:
            raise ValueError(
                f"context_processes={self.context_processes}: must be at least 1, or null for all; "
                "try context_processes=null"
            )
        shares = self.context_shares
        if shares is not None and not (shares and all(0 < share < math.inf for share in shares)):
            raise ValueError(
                f"context_shares={told(shares)}: must be numbers above 0, or null for equal parts; "
                "try context_shares=null"
            )
        if shares is not None and len(shares) == 1:
            raise ValueError(
                f"context_shares={told(shares)}: one part is the whole sequence; a number for each process "
                "that shares it is allowed; try context_shares=null"
            )
        for name, given in (
            ("context_processes", self.context_processes),
            ("context_shares", shares and told(shares)),
        ):
            if given is not None and self.kind != "context":
                raise ValueError(f"{name}={given}: parallel={self.kind} cuts no sequences; try {name}=null")
        if shares is not None and self.context_processes not in (None, len(shares)):
            raise ValueError(
                f"context_shares={told(shares)}: context_processes={self.context_processes} share a "
                f"sequence, and as many numbers are allowed; try context_processes={len(shares)}"
            )

    @property
    def sharing(self) -> int | None:
        """How many processes share a sequence; None for all."""
        if self.context_processes is None and self.context_shares is not None:
            return len(self.context_shares)
        return self.context_processes
