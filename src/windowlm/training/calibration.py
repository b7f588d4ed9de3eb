"""Time and memory of one training batch, measured before the run that they predict."""

import contextlib
import copy
import gc
import time
from dataclasses import dataclass
from typing import Any

import torch

from windowlm.data.packing import UNSCORED
from windowlm.evaluation.precision import AUTOCAST_DTYPES
from windowlm.model.decoder import Decoder
from windowlm.training.config import Precision
from windowlm.training.linear_cross_entropy import HeadLoss, linear_cross_entropy
from windowlm.training.peak_memory import peak_memory_bytes, reset_peak_memory

# A mean and a mean square.
COPIES_OF_WEIGHTS_IN_ADAMW = 2


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
    loss: HeadLoss = linear_cross_entropy,
) -> Calibration:
    """Run one batch three times on a copy of ``model``: once to warm up, twice for time.

    Args:
        model: on the CPU; it is not changed.
        batch: a training batch; without `documents_BT` and `positions_BT` each sequence is one document.
        precision: Lightning's name.
        device: where the run will be.
        loss: of head and targets.
    """
    gc.collect()
    reset_peak_memory(device)
    copied = copy.deepcopy(model).to(device)
    if precision == "bf16-true":
        copied = copied.to(torch.bfloat16)
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    _forward_backward(copied, batch, precision, loss)
    timed = min(
        (_forward_backward(copied, batch, precision, loss) for _ in range(2)), key=lambda pair: pair[1]
    )
    weights = sum(parameter.numel() * parameter.element_size() for parameter in copied.parameters())
    # On the CPU the original has been counted with the process, and the run trains that one.
    copies = COPIES_OF_WEIGHTS_IN_ADAMW - (1 if device.type == "cpu" else 0)
    return Calibration(
        forward_seconds=timed[0],
        seconds_per_batch=timed[1],
        memory_bytes=peak_memory_bytes(device) + copies * weights,
    )


def _forward_backward(
    model: Decoder, batch: dict[str, torch.Tensor], precision: Precision, loss: HeadLoss
) -> tuple[float, float]:
    device = next(model.parameters()).device
    dtype = AUTOCAST_DTYPES.get(precision)
    autocast: Any = torch.autocast(device.type, dtype) if dtype is not None else contextlib.nullcontext()

    def summed_loss() -> torch.Tensor:
        with autocast:
            hidden_BTD = model.hidden(
                batch["tokens_BT"], batch.get("documents_BT"), batch.get("positions_BT")
            )
            targets_N = batch["targets_BT"].flatten()
            return loss(hidden_BTD.flatten(0, 1), model.head.weight, targets_N, unscored=UNSCORED)[0]

    started = _now(device)
    with torch.no_grad():  # training's own forward pass may hold a part of the backward
        summed_loss()
    forward = _now(device) - started
    started = _now(device)
    summed_loss().backward()  # type: ignore[no-untyped-call]
    return forward, _now(device) - started


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()
