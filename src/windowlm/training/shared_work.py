"""How the processes of a run share its work: rows of the batch, parts of the model or of each sequence."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy

from windowlm.attention.window import outside_inference_mode
from windowlm.config import TrainConfig
from windowlm.model.decoder import Decoder, Visibilities
from windowlm.parallel.context_group import ContextGroup
from windowlm.parallel.own_gpu import check_gpus
from windowlm.parallel.processes import ALONE, Processes
from windowlm.parallel.sequence_shard import shard_visibilities
from windowlm.training.compilation import Graphs
from windowlm.training.device_batch import prepared_on, visibilities_on
from windowlm.training.gradients_at_once import GradientsAtOnceStrategy
from windowlm.training.sharded_model import ShardedStrategy
from windowlm.training.shares import blocks_at_once, check_divisible, context_processes

# What a part of a sequence is cut from a batch.
BY_TOKEN = ("tokens_BT", "targets_BT", "documents_BT", "positions_BT")
# A run has those of its batches and of its validation's, and a window's warm-up goes through others.
PLANS_KEPT = 4


@dataclass(frozen=True)
class SharedWork:
    """One process's share.

    Attributes:
        processes: all of the run.
        kind: `ParallelConfig.kind`.
        readers: how many parts each batch is read in.
        context: those that share a sequence with this process; None where no sequence is cut.
        blocks_at_once: of ``fsdp2``, how many blocks' weights a process gathers at once.
    """

    processes: Processes = ALONE
    kind: str = "ddp"
    readers: int = 1
    context: ContextGroup | None = None
    blocks_at_once: int = 1

    @classmethod
    def of(cls, config: TrainConfig, processes: Processes, device: torch.device) -> "SharedWork":
        """Share the work as the settings say.

        Raises:
            ConfigError: it cannot be cut into such shares, or not over these processes.
            UserError: more processes than GPUs.
        """
        sharing = context_processes(config, processes.size)
        at_once = blocks_at_once(
            config.parallel, config.model.layers, checkpointed=config.trainer.activation_checkpointing
        )
        readers = processes.size // sharing
        check_divisible(config, readers, sharing)
        if processes.size == 1:
            return cls()
        if device.type == "cuda":
            check_gpus(processes.place, "trainer.devices")
        if config.parallel.kind != "context":
            return cls(processes, config.parallel.kind, readers, blocks_at_once=at_once)
        group = ContextGroup.of(device, sharing, config.parallel.context_shares)
        return cls(processes, config.parallel.kind, readers, group)

    @property
    def reader(self) -> int:
        """Which part of each batch this process reads."""
        return self.processes.rank // self.parts

    @property
    def sharded(self) -> bool:
        """Whether each process holds a part of the model."""
        return self.processes.size > 1 and self.kind == "fsdp2"

    @property
    def parts(self) -> int:
        """How many each sequence is cut in."""
        return self.processes.size // self.readers

    @property
    def graphs(self) -> Graphs:
        """Of a compiled model."""
        if not self.sharded and self.processes.on_one_machine:
            return "one"
        # Over a network gradients take long, and those of one graph could not travel while it is computed.
        return "blocks" if self.context is None else "pieces"

    def strategy(self, device: torch.device) -> Strategy:
        """Lightning's."""
        if self.processes.size == 1:
            return SingleDeviceStrategy(device=device)
        if self.sharded:
            return ShardedStrategy(
                data_parallel_size=self.processes.size,
                tensor_parallel_size=1,
                save_distributed_checkpoint=False,
            )
        # torch's buckets change after the first step of each start, and with them the order of gloo's sums.
        if self.processes.on_one_machine or device.type == "cpu":
            return GradientsAtOnceStrategy()
        # Buffers hold sums of each process's own.
        return DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)

    def own_tokens(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with this process's part of each sequence."""
        if self.context is None:
            return batch
        return {name: self.own_part(value) if name in BY_TOKEN else value for name, value in batch.items()}

    def own_part(self, tensor_BT: torch.Tensor) -> torch.Tensor:
        """This process's part of each sequence of a tensor [B, T, ...]."""
        return tensor_BT if self.context is None else self.context.shard(tensor_BT)

    def visibilities(
        self, model: Decoder, shown: dict[str, Any], device: torch.device, window_limit: int | None
    ) -> Visibilities:
        """What each window shows in a batch of whole sequences on the CPU; see `visibilities_on`."""
        if self.context is None:
            return visibilities_on(model, shown, device, window_limit)
        batch, tokens = shown["tokens_BT"].shape
        layers = tuple(zip(model.layer_windows, model.config.layer_sinks(), strict=True))
        arguments = (self.context, layers, batch, tokens, window_limit, model.earlier_tokens_read(), device)
        documents_BT, positions_BT = shown.get("documents_BT"), shown.get("positions_BT")
        if documents_BT is None and positions_BT is None:
            return _of_whole_rows(*arguments)
        return _of_shards(*arguments, documents_BT, positions_BT)


def _of_shards(
    group: ContextGroup,
    layers: tuple[tuple[int | None, int], ...],
    batch: int,
    tokens: int,
    window_limit: int | None,
    earlier: tuple[int, ...],
    device: torch.device,
    documents_BT: torch.Tensor | None = None,
    positions_BT: torch.Tensor | None = None,
) -> Visibilities:
    visibilities = shard_visibilities(
        dict(layers),
        group,
        batch,
        tokens,
        documents_BT=documents_BT,
        positions_BT=positions_BT,
        window_limit=window_limit,
        earlier=earlier,
    )
    return prepared_on(visibilities, batch, device)


@lru_cache(maxsize=PLANS_KEPT)
def _of_whole_rows(*arguments: Any) -> Visibilities:
    """The same for each batch of rows that are one document each, training and validation alike."""
    return outside_inference_mode(lambda: _of_shards(*arguments))
