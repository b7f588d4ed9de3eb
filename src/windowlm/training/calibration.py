"""Time and memory of one training batch, measured before the run that they predict."""

import copy
import gc
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision

from windowlm.data.packing import UNSCORED
from windowlm.evaluation.precision import WEIGHT_DTYPES
from windowlm.model.decoder import Decoder
from windowlm.training.compilation import HiddenStates, hidden_states
from windowlm.training.config import OptimizerConfig, Precision
from windowlm.training.linear_cross_entropy import HeadLoss, linear_cross_entropy
from windowlm.training.optimizer import build_optimizer
from windowlm.training.peak_memory import peak_memory_bytes, reset_peak_memory
from windowlm.training.shared_work import SharedWork

# In float32: a mean and a mean square of each number, Muon a mean alone; a copy of weights that are narrower.
ADAMW_BYTES, MUON_BYTES, MASTER_BYTES = 8, 4, 4
AVERAGE_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Measured on one batch.

    Attributes:
        seconds_per_batch: forward and backward, without the optimizer.
        forward_seconds: forward alone.
        memory_bytes: expected peak of training, the quantity that ``peak_memory`` measures: what the batch
            took at its peak, and the optimizer's state.
    """

    seconds_per_batch: float
    forward_seconds: float
    memory_bytes: int


def calibrate(
    model: Decoder,
    batch: dict[str, torch.Tensor],
    precision: Precision,
    device: torch.device,
    *,
    states_of: Callable[[Decoder], HiddenStates] = hidden_states,
    loss: HeadLoss = linear_cross_entropy,
    optimizer: OptimizerConfig | None = None,
    window_limits: Sequence[int | None] = (),
    further_targets: int = 0,
    work: SharedWork | None = None,
) -> Calibration:
    """Run one batch on a copy of ``model``: once for each limit of windows to warm up, and once for time.

    Processes that share sequences run it together; others each for itself, with a whole model.

    What is compiled or loaded here the run finds at hand, also that of each limit of windows, and the
    optimizer's kernels.

    Args:
        model: on the CPU; it is not changed.
        batch: a training batch; without `documents_BT` and `positions_BT` each sequence is one document.
        precision: Lightning's name.
        device: where the run will be.
        states_of: makes the hidden states as the run will; compilation is not counted.
        loss: of head and targets.
        optimizer: its settings, for its memory and to take a step at last; None for AdamW, without a step.
        window_limits: most keys that a window shows in the stages of the run, where these are to be compiled.
        further_targets: how often head and loss are taken besides once, at most.
        work: how several processes share it; None for one alone.
    """
    work = work or SharedWork()
    gc.collect()
    reset_peak_memory(device)
    copied = copy.deepcopy(model).to(device)
    copied = copied.to(WEIGHT_DTYPES[precision])
    of_limits = {
        limit: work.visibilities(copied, batch, device, limit)
        for limit in dict.fromkeys((*window_limits, None))
    }
    batch = {name: tensor.to(device) for name, tensor in work.own_tokens(batch).items()}
    hidden = states_of(copied)

    def summed_loss(window_limit: int | None = None, further: int = further_targets) -> torch.Tensor:
        hidden_BTD = hidden(batch["tokens_BT"], visibilities=of_limits[window_limit])
        targets_N = batch["targets_BT"].flatten()
        head, hidden_ND = copied.head, hidden_BTD.flatten(0, 1)
        of_targets = [
            loss(hidden_ND, head.weight, targets_N, unscored=UNSCORED, logit_cap=head.logit_cap)[0]
            for _ in range(1 + further)
        ]
        return torch.stack(of_targets).sum()

    def validation_loss() -> torch.Tensor:
        return summed_loss(further=0)

    for limit in of_limits:
        _forward_backward(copied, partial(summed_loss, limit), precision)
    _forward(copied, validation_loss, precision)
    seconds_per_batch = _forward_backward(copied, summed_loss, precision)
    memory_bytes = peak_memory_bytes(device) + kept_bytes(copied, optimizer)
    if device.type == "cpu":
        # The original has been counted with the process, and the run trains that one.
        memory_bytes -= sum(weight.numel() * weight.element_size() for weight in copied.parameters())
    if optimizer is not None:
        # Before another pass: gradients may lie in the memory of a graph that it would write over.
        build_optimizer(copied, optimizer, fused=precision != "16-mixed").step()
    forward_seconds = _forward(copied, validation_loss, precision)
    return Calibration(
        forward_seconds=forward_seconds, seconds_per_batch=seconds_per_batch, memory_bytes=memory_bytes
    )


def kept_bytes(model: Decoder, optimizer: OptimizerConfig | None) -> int:
    """What an optimizer keeps besides the weights.

    Args:
        model: in the dtype that it is trained in.
        optimizer: its settings; None for AdamW.
    """
    numbers = sum(weight.numel() for weight in model.parameters())
    each = ADAMW_BYTES + (MASTER_BYTES if model.head.weight.element_size() < MASTER_BYTES else 0)
    if optimizer is None:
        return each * numbers
    if optimizer.averaging is not None:
        each += AVERAGE_BYTES
    of_muon = sum(matrix.numel() for matrix in model.hidden_matrices()) if optimizer.kind == "muon" else 0
    return each * numbers - (ADAMW_BYTES - MUON_BYTES) * of_muon


def _forward(model: Decoder, summed_loss: Callable[[], torch.Tensor], precision: Precision) -> float:
    """Seconds of it as in a validation; training's own forward pass may hold a part of the backward."""
    device = next(model.parameters()).device
    started = _now(device)
    with _forward_context(precision, device), torch.no_grad():
        model.eval()
        summed_loss()
        model.train()
    return _now(device) - started


def _forward_backward(model: Decoder, summed_loss: Callable[[], torch.Tensor], precision: Precision) -> float:
    """Seconds of it."""
    device = next(model.parameters()).device
    started = _now(device)
    with _forward_context(precision, device):
        summed = summed_loss()
    model.zero_grad()
    summed.backward()  # type: ignore[no-untyped-call]
    return _now(device) - started


def _forward_context(precision: Precision, device: torch.device) -> AbstractContextManager[None]:
    """Lightning's own, as compiled graphs are bound to the cache of autocast and to the default dtype too."""
    if precision == "bf16-mixed" or precision == "16-mixed":
        return MixedPrecision(precision, device.type).forward_context()
    return HalfPrecision(precision).forward_context() if precision == "bf16-true" else nullcontext()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()
