"""The processes of a command as Lightning is told of them.

Its own reading of SLURM's variables takes a batch script for a step of the job, and refuses --ntasks without
--ntasks-per-node.
"""

import os

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment

from windowlm.parallel.place import Place


class LaunchedProcesses(ClusterEnvironment):
    """Processes that their launcher has started, and that have met.

    Args:
        place: which of them this is.
    """

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place

    @property
    def creates_processes_externally(self) -> bool:  # noqa: D102
        return True

    @property
    def main_address(self) -> str:  # noqa: D102
        return os.environ["MASTER_ADDR"]

    @property
    def main_port(self) -> int:  # noqa: D102
        return int(os.environ["MASTER_PORT"])

    @staticmethod
    def detect() -> bool:  # noqa: D102
        return False

    def world_size(self) -> int:  # noqa: D102
        return self.place.size

    def set_world_size(self, size: int) -> None:  # noqa: D102
        assert size == self.place.size

    def global_rank(self) -> int:  # noqa: D102
        return self.place.rank

    def set_global_rank(self, rank: int) -> None:  # noqa: D102
        assert rank == self.place.rank

    def local_rank(self) -> int:  # noqa: D102
        return self.place.local_rank

    def node_rank(self) -> int:  # noqa: D102
        return self.place.rank // self.place.local_size
