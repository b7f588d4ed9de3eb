"""Time and memory of one training batch, measured before the run that they predict."""

import contextlib
import copy
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from windowlm.model.decoder import Decoder
from windowlm.training.config import Precision
from windowlm.training.loss_sums import IGNORED

# AdamW keeps a mean and a mean square; the gradient is a third copy.
COPIES_OF_WEIGHTS_IN_TRAINING = 4


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Measured on one batch.

    Attributes:
        seconds_per_batch: forward and backward, without the optimizer.
        forward_seconds: forward alone.
        memory_bytes: weights, gradients, optimizer state and what the forward pass keeps for the backward.
    """

    seconds_per_batch: float
    forward_seconds: float
    memory_bytes: int


def calibrate(
    model: Decoder, batch: dict[str, torch.Tensor], precision: Precision, device: torch.device
) -> Calibration:
    """Run one batch three times on a copy of ``model``: once to count memory and warm up, twice for time.

    Args:
        model: on any device; it is not changed.
        batch: a training batch.
        precision: Lightning's name.
        device: where the run will be.
    """
    copied = copy.deepcopy(model).to(device)
    if precision == "bf16-true":
        copied = copied.to(torch.bfloat16)
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _forward_backward(copied, batch, precision)
    timed = min((_forward_backward(copied, batch, precision) for _ in range(2)), key=lambda pair: pair[1])
    weights = {p.data_ptr(): p.numel() * p.element_size() for p in copied.parameters()}
    activations = sum(size for address, size in kept.items() if address not in weights)
    memory = COPIES_OF_WEIGHTS_IN_TRAINING * sum(weights.values()) + activations
    return Calibration(forward_seconds=timed[0], seconds_per_batch=timed[1], memory_bytes=memory)


def _forward_backward(
    model: Decoder, batch: dict[str, torch.Tensor], precision: Precision
) -> tuple[float, float]:
    device = next(model.parameters()).device
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    autocast: Any = torch.autocast(device.type, dtype) if dtype is not None else contextlib.nullcontext()
    started = _now(device)
    with autocast:
        logits_BTV = model(batch["tokens_BT"], batch["documents_BT"], batch["positions_BT"])
        loss = F.cross_entropy(
            logits_BTV.flatten(0, 1).float(), batch["targets_BT"].flatten(), ignore_index=IGNORED
        )
    forward = _now(device) - started
    loss.backward()  # type: ignore[no-untyped-call]
    return forward, _now(device) - started


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()
