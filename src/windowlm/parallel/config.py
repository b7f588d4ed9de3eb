"""Settings of work by several processes."""

from dataclasses import dataclass
from typing import ClassVar, Literal


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the processes of a run share the work; one process does all of it, which its plan says.

    Args:
        kind: ``ddp`` gives each process rows of the batch and a whole model, ``fsdp2`` rows and a part of the
            model (Zhao et al. 2023, arXiv:2304.11277), ``context`` a part of each sequence.
        context_processes: of ``context``, how many share a sequence; with more processes several such groups
            share the batch. Null for all.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    kind: Literal["ddp", "fsdp2", "context"] = "ddp"
    context_processes: int | None = None

    def __post_init__(self) -> None:
        if self.context_processes is None:
            return
        if self.context_processes < 1:
            raise ValueError(
                f"context_processes={self.context_processes}: must be at least 1, or null for all; "
                "try context_processes=null"
            )
        if self.kind != "context":
            raise ValueError(
                f"context_processes={self.context_processes}: parallel={self.kind} cuts no sequences; "
                "try context_processes=null"
            )
