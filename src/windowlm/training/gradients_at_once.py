"""DDP whose gradients travel at once, behind the backward pass.

torch's own sends them in buckets while the pass goes on. A decoder that is one compiled graph has them all at
its end, and the copies into buckets are then for nothing. Of processes of one machine that costs less than to
cut the decoder in graphs: `docs/scaling.md` says what profiles showed.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.distributed_c10d import _coalescing_manager

from windowlm.parallel.processes import PATIENCE, nccl_options

# Of the links between GPUs; NCCL alone takes fewer, which leaves multiprocessors to others.
CHANNELS = 64


class GradientsAtOnceStrategy(DDPStrategy):
    """Lightning's, without torch's wrapper around the model.

    What a module does `on_after_backward` comes before the average.
    """

    _kept_apart = False
    _group: dist.ProcessGroup | None = None

    def configure_ddp(self) -> None:
        """Connect the processes for gradients, and give each the leader's weights."""
        assert self.model is not None
        self._group = gradient_group(self.root_device)
        for parameter in self.model.parameters():  # buffers hold sums of each process's own
            dist.broadcast(parameter.detach(), 0)

    def post_backward(self, closure_loss: Tensor) -> None:
        """Average the gradients, of which all processes must have the same."""
        assert self.model is not None
        if not self._kept_apart:
            gradients = (parameter.grad for parameter in self.model.parameters())
            average((gradient for gradient in gradients if gradient is not None), self._group)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Within it each process adds up gradients of its own."""
        self._kept_apart = True
        try:
            yield
        finally:
            self._kept_apart = False


def gradient_group(device: torch.device) -> dist.ProcessGroup | None:
    """All processes, by connections for what travels while nothing is computed; None: torch's own will do."""
    if device.type != "cuda":
        return None
    options = nccl_options()
    # NCCL 2.28 refuses the least without the most (github.com/NVIDIA/nccl/pull/2256).
    options.config.min_ctas = options.config.max_ctas = CHANNELS
    group: dist.ProcessGroup = dist.new_group(timeout=PATIENCE, backend="nccl", pg_options=options)
    return group


def average(tensors: Iterable[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Put the mean over the group, or all processes, in the place of each tensor; of one device."""
    by_dtype: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        by_dtype[tensor.dtype].append(tensor)
    for alike in by_dtype.values():
        operation = dist.ReduceOp.AVG
        if alike[0].device.type == "cpu":  # gloo adds alone
            torch._foreach_mul_(alike, 1 / dist.get_world_size(group))
            operation = dist.ReduceOp.SUM
        with _coalescing_manager(group):
            for tensor in alike:
                dist.all_reduce(tensor, operation, group)
