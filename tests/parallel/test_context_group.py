"""Groups of processes that share a sequence."""

import torch
import torch.distributed as dist

from tests.parallel.processes import run_in_processes
from windowlm.parallel.context_group import ContextGroup


def places(rank: int, size: int) -> tuple[int, int, bool, int]:
    """Place and size of the own group, whether it is that of all, and the sum of its ranks."""
    group = ContextGroup.of(torch.device("cpu"), size)
    assert group.processes is not None
    of_all = group.processes is dist.group.WORLD
    return group.rank, group.size, of_all, int(group.summed(torch.tensor(rank)))


def test_a_group_of_all_processes_has_connections_of_its_own() -> None:
    for rank, found in enumerate(run_in_processes(2, places, 2)):
        assert found == (rank, 2, False, 1)


def test_neighbours_share_a_sequence() -> None:
    for rank, found in enumerate(run_in_processes(4, places, 2)):
        assert found == (rank % 2, 2, False, 1 if rank < 2 else 5)
