"""DDP whose gradients travel at once, behind the backward pass.

torch's own sends them in buckets while the pass goes on. A decoder that is one compiled graph has them all at
its end, and the copies into buckets are then for nothing. Of processes of one machine that costs less than to
cut the decoder in graphs: `docs/scaling.md` has both measured.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.distributed_c10d import _coalescing_manager


class GradientsAtOnceStrategy(DDPStrategy):
    """Lightning's, without torch's wrapper around the model.

    What a module does `on_after_backward` comes before the average.
    """

    _kept_apart = False

    def configure_ddp(self) -> None:
        """Give every process the leader's weights."""
        assert self.model is not None
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            dist.broadcast(tensor.detach(), 0)

    def post_backward(self, closure_loss: Tensor) -> None:
        """Average the gradients, of which all processes must have the same."""
        assert self.model is not None
        if not self._kept_apart:
            average(parameter.grad for parameter in self.model.parameters() if parameter.grad is not None)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Within it each process adds up gradients of its own."""
        self._kept_apart = True
        try:
            yield
        finally:
            self._kept_apart = False


def average(tensors: Iterable[Tensor]) -> None:
    """Put the mean over all processes in the place of each tensor; of one device."""
    by_dtype: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        by_dtype[tensor.dtype].append(tensor)
    for alike in by_dtype.values():
        operation = dist.ReduceOp.AVG
        if alike[0].device.type == "cpu":  # gloo adds alone
            torch._foreach_mul_(alike, 1 / dist.get_world_size())
            operation = dist.ReduceOp.SUM
        with _coalescing_manager():
            for tensor in alike:
                dist.all_reduce(tensor, operation)
