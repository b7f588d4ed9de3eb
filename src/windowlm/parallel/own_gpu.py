"""A GPU of its own for each process of a machine."""

import os

import torch

from windowlm.errors import UserError
from windowlm.parallel.place import Place


def check_gpus(place: Place, setting: str) -> None:
    """See that there are as many GPUs as processes on this machine, and a way to send between them.

    Args:
        place: of this process.
        setting: full key of the number of processes, for the message.

    Raises:
        UserError: there are not.
    """
    if not torch.distributed.is_nccl_available():
        raise UserError(
            f"{setting}={place.local_size}: several GPUs need NCCL, and this build of torch has none; try "
            f"{setting}=1"
        )
    if (there := torch.cuda.device_count()) < place.local_size:
        if "SLURM_STEP_ID" in os.environ and "RANK" not in os.environ:
            raise UserError(
                f"{place.local_size} tasks of this step on this machine, and {there} GPUs are shown to one: "
                f"each must see those of all; try srun --gpus-per-node={place.local_size} --gpu-bind=none in "
                "place of --gpus-per-task"
            )
        raise UserError(
            f"{place.local_size} processes on this machine, which shows {there} GPUs: as many or fewer are "
            f"allowed; try {setting}={there}, or torchrun --nproc-per-node {there}"
        )


def own_gpu(device: torch.device, place: Place, setting: str) -> torch.device:
    """The GPU of this process where it is one of several that use GPUs, otherwise the device as it is.

    Raises:
        UserError: fewer GPUs than processes.
    """
    if device.type != "cuda" or place.size == 1:
        return device
    check_gpus(place, setting)
    own = torch.device("cuda", place.local_rank)
    torch.cuda.set_device(own)
    return own
