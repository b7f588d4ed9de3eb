"""DDP that sums gradients on CPUs in the order of the processes, so that a resume keeps every bit.

DDP sorts its buckets anew after the first step of each start, and where in a bucket a gradient lies decides
in which order gloo adds those of three and more processes.
"""

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor


class OrderedDDPStrategy(DDPStrategy):
    """Lightning's; on GPUs the sums are NCCL's."""

    def configure_ddp(self) -> None:
        """Wrap the model."""
        super().configure_ddp()
        if self.root_device.type == "cpu":
            model: Any = self.model
            model.register_comm_hook(None, mean_in_order)


def mean_in_order(
    state: None,
    bucket: dist.GradBucket,  # type: ignore[name-defined]  # DDP asks for this very annotation
) -> torch.futures.Future[Tensor]:
    """The mean of a bucket of gradients, as DDP asks for it, over the processes."""
    own = bucket.buffer()
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    work = dist.all_gather(parts, own, async_op=True)
    assert work is not None

    def mean(gathered: torch.futures.Future[Any]) -> Tensor:
        gathered.value()  # raises where a process is gone
        total = parts[0]
        for part in parts[1:]:
            total += part
        return total.div_(len(parts))

    future: torch.futures.Future[Tensor] = work.get_future().then(mean)
    return future
