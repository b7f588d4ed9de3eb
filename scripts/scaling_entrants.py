"""One process of an entrant in the benchmark of scaling: a bare loop around what processes share.

python scripts/scaling_entrants.py JOB

JOB is a `Job` as JSON; a launcher's variables say which of the processes this is. Model, loss, optimizer and
the ways of sharing are those of a run of ``train.py``, without Lightning, loader and logs; torch's wrapper
takes the place of our sums of gradients in `TORCH_DDP`, and the peers of `context_peers` that of the halo
exchange. The leader writes what was measured to standard output, as JSON; whatever is printed besides goes to
standard error.

Shapes: B batch, T tokens of a whole sequence, L own tokens, D model width.
"""

import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from context_peers import PEERS
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from training_entrants import FEW_BATCHES, LEARNING_RATE, Shape, autocast_of, compile_seconds

from windowlm.attention.document_layout import positions_in_documents
from windowlm.data.packing import UNSCORED
from windowlm.evaluation.precision import WEIGHT_DTYPES
from windowlm.model.decoder import Decoder, Visibilities
from windowlm.parallel.config import ParallelConfig
from windowlm.parallel.context_group import ContextGroup
from windowlm.parallel.own_gpu import own_gpu
from windowlm.parallel.processes import Processes
from windowlm.training.compilation import hidden_states, is_compiled
from windowlm.training.config import OptimizerConfig, TrainerConfig
from windowlm.training.gradient import gradient_norm, rescale_gradient
from windowlm.training.gradients_at_once import average, gradient_group
from windowlm.training.linear_cross_entropy import head_loss
from windowlm.training.optimizer import build_optimizer
from windowlm.training.peak_memory import peak_memory_bytes, reset_peak_memory
from windowlm.training.sharded_model import local, shard_model
from windowlm.training.shared_work import SharedWork
from windowlm.training.shares import blocks_at_once

ALONE, APART, DDP, TORCH_DDP, FSDP2, CONTEXT = "alone", "apart", "ddp", "torch ddp", "fsdp2", "context"
BY_ROWS = (ALONE, APART, DDP, TORCH_DDP, FSDP2)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the processes of an entrant train together.

    Attributes:
        share: one of `BY_ROWS`, each process with the batch of the shape, `APART` with a model of its own;
            `CONTEXT` or a name of `context_peers.PEERS`, with a part of each of its sequences.
        shape: as a dictionary of `Shape`.
        precision: Lightning's name.
        device: cpu or cuda.
        seed: of weights and tokens.
        warmup, rounds, steps: steps before, and rounds of so many.
        activation_checkpointing: as the setting of the trainer.
        in_pieces: whether the decoder is cut where others' keys arrive, even if one graph could hold it.
        documents: tokens of the documents that a row holds, on average; 0 for one document a row.
        shares: of `CONTEXT`, how the parts of a sequence relate; None for equal ones.
        gpu: that of one process alone.
    """

    share: str
    shape: dict[str, int]
    precision: str
    device: str
    seed: int
    warmup: int
    rounds: int
    steps: int
    activation_checkpointing: bool = False
    in_pieces: bool = False
    documents: int = 0
    shares: tuple[float, ...] | None = None
    gpu: int = 0


def main() -> None:
    """Run the job."""
    job = Job(**json.loads(sys.argv[1]))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        answer = measured(job)
    except Exception as error:
        # The others would wait for this one as the libraries shut down.
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    if answer is not None:
        print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)


def drawn_tokens(shape: Shape, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Random inputs and targets on the device, int64 [B, T] each, a few batches over and over."""
    size = (shape.batch, shape.sequence_length + 1)
    drawn = [torch.randint(0, shape.vocabulary_size, size, device=device) for _ in range(FEW_BATCHES)]
    return itertools.cycle([(batch[:, :-1].contiguous(), batch[:, 1:].contiguous()) for batch in drawn])


def drawn_documents(shape: Shape, tokens: int) -> Iterator[dict[str, Tensor]]:
    """Documents and positions of rows on the CPU, int64 [B, T] each, as few as there are batches; a document
    starts at each token with the same chance, and has so many on average.
    """
    size = (shape.batch, shape.sequence_length)
    drawn = []
    for _ in range(FEW_BATCHES):
        documents_BT = (torch.rand(size) < 1 / tokens).cumsum(1)
        drawn.append({"documents_BT": documents_BT, "positions_BT": positions_in_documents(documents_BT)})
    return itertools.cycle(drawn)


def measured(job: Job) -> dict[str, Any] | None:
    """Seconds, memory and bytes of the job; None but for the leader."""
    processes = Processes.join()
    device = own_gpu(torch.device(job.device), processes.place, "--processes")
    if device.type == "cuda" and processes.size == 1:
        device = torch.device("cuda", job.gpu)
        torch.cuda.set_device(device)
    loop = Loop(job, processes, device)

    def seconds_of(steps: int) -> float:
        processes.wait()
        started = time.perf_counter()
        for _ in range(steps):
            loop.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        processes.wait()
        return time.perf_counter() - started

    # Of the operations of a compiled graph no bytes are counted.
    counting = torch.compiler.set_stance("force_eager" if job.share == CONTEXT else "default")
    with counting:
        loop.step()
    first_losses = processes.gather(float(loop.loss))
    sent = processes.gather(loop.bytes_sent)
    seconds_of(job.warmup)
    reset_peak_memory(device)
    rounds = [seconds_of(job.steps) / job.steps for _ in range(job.rounds)]
    peaks = processes.gather(peak_memory_bytes(device))
    states = processes.gather(loop.state_bytes)
    losses = processes.gather(float(loop.loss))
    if not processes.leads:
        return None
    return {
        "rounds_s": rounds,
        "step_s": statistics.median(rounds),
        "peak_memory_bytes": max(peaks),
        "state_bytes": max(states),
        "bytes_sent_forward": sum(forward for forward, _ in sent),
        "bytes_sent_backward": sum(back for _, back in sent),
        # Before any update it is that of one process but for rounding; the last has gone its own way.
        "first_loss": sum(first_losses) / len(first_losses),
        "loss": sum(losses) / len(losses),
        "compile_s": compile_seconds(),
    }


class Loop:
    """Takes steps together with the other processes.

    Attributes:
        loss: of the last step, see `MeanLoss`.
        bytes_sent: by this process in the forward and backward pass of the last step, as its group counts
            them outside of graphs.
        state_bytes: of this process's part of weights, gradients and optimizer state.
    """

    def __init__(self, job: Job, processes: Processes, device: torch.device) -> None:
        shape = Shape(**job.shape)
        self.job, self.processes, self.device = job, processes, device
        self.settings = OptimizerConfig(kind="adamw", lr=LEARNING_RATE)
        self.loss = torch.tensor(math.nan)
        self.bytes_sent = (0, 0)
        self.state_bytes = 0
        by_rows = job.share in BY_ROWS
        shares = None if job.shares is None else tuple(job.shares)
        self.group = ContextGroup() if by_rows else ContextGroup.of(device, processes.size, shares)
        if job.share in (ALONE, APART):
            self.work = SharedWork()
        elif by_rows:
            settings = ParallelConfig(kind="fsdp2" if job.share == FSDP2 else "ddp")
            at_once = blocks_at_once(settings, shape.layers, checkpointed=job.activation_checkpointing)
            self.work = SharedWork(processes, settings.kind, processes.size, blocks_at_once=at_once)
        else:
            self.work = SharedWork(processes, CONTEXT, 1, self.group)
        torch.manual_seed(job.seed)
        model = Decoder(shape.model_config(), shape.vocabulary_size).to(device, WEIGHT_DTYPES[job.precision])
        if self.work.sharded:
            shard_model(model, init_device_mesh(device.type, (processes.size,)), self.work.blocks_at_once)
        # Of a shared sequence parts may have more or fewer.
        targets = shape.tokens if by_rows else shape.tokens / processes.size
        self.mean_loss: nn.Module = MeanLoss(model, job, device, self.work, targets)
        if job.share == TORCH_DDP:
            self.mean_loss = DistributedDataParallel(
                self.mean_loss, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        self.shares_gradients = (
            self.work.processes.size > 1 and not self.work.sharded and job.share != TORCH_DDP
        )
        self.gradient_group = gradient_group(device) if self.shares_gradients else None
        self.optimizer = build_optimizer(model, self.settings, fused=True)
        # Rows differ between processes, the tokens of a shared sequence do not.
        torch.manual_seed(job.seed + (processes.rank if by_rows else 0))
        self.batches = drawn_tokens(shape, job.device)
        self.own_tokens, self.visibilities = self.shares(model, shape)
        self.autocast = autocast_of(job)

    def shares(
        self, model: Decoder, shape: Shape
    ) -> tuple[Callable[[Tensor], Tensor], Callable[[], Visibilities]]:
        """What this process takes of a tensor [B, T], and what its layers see, made anew for each step."""
        if self.job.share in PEERS:
            peer = PEERS[self.job.share]
            own_L = peer.own_tokens(self.group, shape.sequence_length, self.device)
            seen: Visibilities = {shape.window: peer.of(self.group, shape.window, own_L)}
            return lambda whole_BT: whole_BT[:, own_L], lambda: seen
        shown = {"tokens_BT": torch.empty((shape.batch, shape.sequence_length), device="meta")}
        told = drawn_documents(shape, self.job.documents) if self.job.documents else itertools.repeat({})
        return self.group.shard, lambda: self.work.visibilities(
            model, {**shown, **next(told)}, self.device, None
        )

    def step(self) -> None:
        """Forward, backward, clipped gradient, optimizer."""
        tokens_BL, targets_BL = (self.own_tokens(whole_BT) for whole_BT in next(self.batches))
        self.group.bytes_sent = 0
        with self.autocast():
            loss = self.mean_loss(tokens_BL, targets_BL, self.visibilities())
        forward = self.group.bytes_sent
        loss.backward()
        self.bytes_sent = forward, self.group.bytes_sent - forward
        trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        gradients = [local(parameter.grad) for parameter in trained if parameter.grad is not None]
        if self.shares_gradients:
            average(gradients, self.gradient_group)
        norm = gradient_norm(gradients)
        if self.work.sharded:
            norm = self.processes.total(norm.square()).sqrt()
        limit = self.settings.gradient_clip
        assert limit is not None
        rescale_gradient(gradients, limit / norm.clamp(min=limit))
        self.optimizer.step()
        if not self.state_bytes:
            states = [value for state in self.optimizer.state.values() for value in state.values()]
            self.state_bytes = sum(local(tensor).nbytes for tensor in (*trained, *gradients, *states))
        self.optimizer.zero_grad()
        self.loss = loss.detach()


class MeanLoss(nn.Module):
    """The loss summed over this process's targets and divided by how many a process has on average."""

    def __init__(
        self, model: Decoder, job: Job, device: torch.device, work: SharedWork, targets: float
    ) -> None:
        super().__init__()
        self.model, self.targets = model, targets
        trainer = TrainerConfig()
        compiled = is_compiled(trainer, device)
        graphs = work.graphs
        if job.share == TORCH_DDP:
            # Gradients of one graph could not travel before it ends.
            graphs = "blocks"
        elif job.in_pieces:
            graphs = "pieces"
        self.hidden = hidden_states(
            model,
            compiled=compiled,
            activation_checkpointing=job.activation_checkpointing,
            graphs=graphs,
            blocks_at_once=work.blocks_at_once,
        )
        self.head_loss = head_loss(trainer.loss, job.precision, compiled=compiled)

    def forward(self, tokens_BL: Tensor, targets_BL: Tensor, visibilities: Visibilities) -> Tensor:
        """A scalar."""
        hidden_BLD = self.hidden(tokens_BL, visibilities=visibilities)
        summed, _ = self.head_loss(
            hidden_BLD.flatten(0, 1), self.model.head.weight, targets_BL.flatten(), unscored=UNSCORED
        )
        return summed / self.targets


if __name__ == "__main__":
    main()
