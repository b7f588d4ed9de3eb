"""Which of the processes of a command this one is, as its launcher says; loads no torch.

`torchrun` and our own launcher set RANK and its like, `srun` the variables of a step of SLURM, and submitit
those of a job on this machine.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """This process among those of the command.

    Attributes:
        rank: number of the process, the leader's 0.
        size: how many there are.
        local_rank: its number on this machine.
        local_size: how many there are on this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def speaks(self) -> bool:
        """Whether it reports a mistake that all processes of its machine find."""
        return self.local_rank == 0


def own_place(environment: Mapping[str, str] = os.environ) -> Place:
    """The place that the launcher gave; one process alone where there was none."""
    if {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= environment.keys():
        size = int(environment["WORLD_SIZE"])
        return Place(
            int(environment["RANK"]),
            size,
            int(environment["LOCAL_RANK"]),
            int(environment.get("LOCAL_WORLD_SIZE", size)),
        )
    if {"SUBMITIT_LOCAL_GLOBALID", "SUBMITIT_LOCAL_NTASKS"} <= environment.keys():
        rank, size = (int(environment[f"SUBMITIT_LOCAL_{name}"]) for name in ("GLOBALID", "NTASKS"))
        return Place(rank, size, rank, size)
    # A batch script has the job's variables and is no step of it.
    if {"SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"} <= environment.keys():
        tasks = _tasks_of_nodes(environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))
        return Place(
            int(environment["SLURM_PROCID"]),
            int(environment["SLURM_STEP_NUM_TASKS"]),
            int(environment["SLURM_LOCALID"]),
            tasks[min(int(environment.get("SLURM_NODEID", 0)), len(tasks) - 1)],
        )
    return Place()


def _tasks_of_nodes(told: str) -> list[int]:
    """SLURM writes 2, 2 and 1 tasks as ``2(x2),1``."""
    tasks: list[int] = []
    for part in told.split(","):
        count, _, nodes = part.partition("(x")
        tasks += [int(count)] * int(nodes.rstrip(")") or 1)
    return tasks
