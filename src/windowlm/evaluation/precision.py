"""A model made ready to be scored: no dropout, no gradients, and the asked precision."""

import contextlib
import copy
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import nn

from windowlm.errors import UserError

Model = TypeVar("Model", bound=nn.Module)

WEIGHT_DTYPES = {
    "32-true": torch.float32,
    "64-true": torch.float64,
    "bf16-true": torch.bfloat16,
    "bf16-mixed": torch.float32,
    "16-mixed": torch.float32,
    "fp8": torch.bfloat16,  # in training alone
}
AUTOCAST_DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def compute_dtype(precision: str) -> torch.dtype:
    """What matrix products are computed in."""
    return AUTOCAST_DTYPES.get(precision, WEIGHT_DTYPES[precision])


@contextlib.contextmanager
def scoring(model: Model, precision: str) -> Iterator[Model]:
    """Lend ``model`` for scoring; it comes back as it was.

    Weights of another dtype are cast in a copy. Only weights are: tables such as those of the rotary
    embedding keep the dtype that their module chose. Float32 products are computed in float32, never in
    TF32.

    Args:
        model: model on its device.
        precision: a key of ``WEIGHT_DTYPES``.

    Raises:
        UserError: 16-mixed on a CPU.
    """
    device = next(model.parameters()).device
    if precision == "16-mixed" and device.type == "cpu":
        raise UserError(
            "evaluation.precision=16-mixed: needs a GPU and the model is on a CPU; allowed there: 32-true, "
            "bf16-mixed, bf16-true, 64-true; try evaluation.precision=32-true"
        )
    dtype = WEIGHT_DTYPES[precision]
    scored = model
    if any(parameter.dtype is not dtype for parameter in model.parameters()):
        scored = copy.deepcopy(model)
        for parameter in scored.parameters():
            parameter.data = parameter.data.to(dtype)
    was_training = scored.training
    matmul_precision = torch.get_float32_matmul_precision()
    scored.eval()
    torch.set_float32_matmul_precision("highest")
    autocast = (
        torch.autocast(device.type, AUTOCAST_DTYPES[precision])
        if precision in AUTOCAST_DTYPES
        else contextlib.nullcontext()
    )
    try:
        # Not inference_mode: tables that a model keeps from here on could not be trained with later.
        with torch.no_grad(), autocast:
            yield scored
    finally:
        torch.set_float32_matmul_precision(matmul_precision)
        scored.train(was_training)
