"""The CPU's way over wide windows and full attention: torch's fused causal attention, and bands behind it.

Queries up to the size of the window see all before them, which torch's own kernel computes faster than long
bands; `banded_matmul` computes the rest. The two operators are opaque to torch.compile. `blockwise` computes
the same by formula, and the gradients where a hidden value overflowed in torch's kernel.

Shapes: B batch, T queries (as many keys), N queries that see all before them, H query heads, K key-value
heads, D head dimension.
"""

from typing import Any

import torch
from torch import Tensor

from ..differentiable import differentiable
from ..operator import Operator
from ..window import Visibility
from . import blockwise
from .autocast import without_autocast
from .banded_matmul import add_gradients, fill_outputs
from .banded_plan import Plan, make_plan
from .scaled_dot_product import widened

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend(
    query_BTHD: Tensor, key_BTKD: Tensor, value_BTKD: Tensor, visibility: Visibility, scale: float
) -> Tensor:
    """Causal attention over the window, without documents or sinks; returns [B, T, H, D]."""
    tokens, dtype = query_BTHD.shape[1], query_BTHD.dtype
    window = tokens if visibility.window is None else min(visibility.window, tokens)
    nothing = torch.empty(0, 0)
    plan = Plan(torch.empty(1, 0, 4, dtype=torch.int64), nothing, nothing.bool()[None], nothing.bool(), 0)
    if window < tokens:
        plan = visibility.once(
            "banded wide", lambda: make_plan(visibility, tokens - window, tokens), sizes=(tokens,)
        )
    with without_autocast(query_BTHD.device):
        tensors = widened(query_BTHD, key_BTKD, value_BTKD)
        output_BTHD = _attention(*tensors, *plan[:4], window, scale)
    return output_BTHD.to(dtype)


_NO_DROPOUT = 0.0, torch.zeros((), dtype=torch.int64)


def _attend(
    query_BTHD: Tensor,
    key_BTKD: Tensor,
    value_BTKD: Tensor,
    blocks: Tensor,
    common: Tensor,
    hidden: Tensor,
    blind: Tensor,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Outputs, and of the first N = `window` queries the softmax's denominators as logarithms, [B, N, H]."""
    first_BHND, normalizer_BHN = _forward(
        *_first(window, query_BTHD, key_BTKD, value_BTKD), 0.0, True, scale=scale
    )
    normalizer_BNH = normalizer_BHN.transpose(1, 2).contiguous()  # as it lies in memory already
    if window == query_BTHD.shape[1]:
        return first_BHND.transpose(1, 2).contiguous(), normalizer_BNH
    output_BTHD = torch.empty(query_BTHD.shape, dtype=query_BTHD.dtype)
    output_BTHD[:, :window] = first_BHND.transpose(1, 2)
    plan = Plan(blocks, common, hidden, blind, 0)
    rest_BTHD = output_BTHD[:, window:]
    fill_outputs(rest_BTHD, query_BTHD[:, window:], key_BTKD, value_BTKD, plan, scale, *_NO_DROPOUT)
    return output_BTHD, normalizer_BNH


def _attend_backward(
    gradient_BTHD: Tensor,
    query_BTHD: Tensor,
    key_BTKD: Tensor,
    value_BTKD: Tensor,
    blocks: Tensor,
    common: Tensor,
    hidden: Tensor,
    blind: Tensor,
    window: int,
    scale: float,
    output_BTHD: Tensor,
    normalizer_BNH: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = query_BTHD, key_BTKD, value_BTKD
    gradient, *first, output = _first(window, gradient_BTHD, *inputs, output_BTHD)
    normalizer_BHN = normalizer_BNH.transpose(1, 2)
    of_first = _backward(gradient, *first, output, normalizer_BHN, 0.0, True, scale=scale)
    gradients = [tensor.transpose(1, 2) for tensor in of_first]
    if window < query_BTHD.shape[1]:
        whole = [torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in inputs]
        for total, added in zip(whole, gradients, strict=True):
            total[:, :window] = added
        query_gradient, key_gradient, value_gradient = gradients = whole
        key_gradient[:, window:] = value_gradient[:, window:] = 0.0
        add_gradients(
            (query_gradient[:, window:], key_gradient, value_gradient), gradient_BTHD[:, window:],
            query_BTHD[:, window:], key_BTKD, value_BTKD, Plan(blocks, common, hidden, blind, 0), scale,
            *_NO_DROPOUT,
        )  # fmt: skip
    if gradients[0].sum().isnan():
        return blockwise.gradients(gradient_BTHD, *inputs, window, scale)
    query_gradient, key_gradient, value_gradient = (tensor.contiguous() for tensor in gradients)
    return query_gradient, key_gradient, value_gradient


def _first(window: int, *tensors_BTHD: Tensor) -> list[Tensor]:
    """The first tokens [B, H, N, D]; copies where torch's kernel cannot step through them."""
    return [
        (first if first.stride(-1) == 1 and 0 not in first.stride() else first.contiguous()).transpose(1, 2)
        for first in (tensor[:, :window] for tensor in tensors_BTHD)
    ]


def _empty_outputs(query_BTHD: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    batch, _, heads, _ = query_BTHD.shape
    return query_BTHD.new_empty(query_BTHD.shape), query_BTHD.new_empty((batch, others[-2], heads))


def _empty_gradients(_: Tensor, *tensors: Any) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (tensor.new_empty(tensor.shape) for tensor in tensors[:3])
    return query, key, value


_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor blocks, Tensor common, Tensor hidden, Tensor blind, "
    "SymInt window, float scale"
)
_attention = differentiable(
    "banded",
    Operator(f"{__name__}.attend", f"({_ARGUMENTS}) -> (Tensor, Tensor)", _attend, _empty_outputs),
    Operator(
        f"{__name__}.attend_backward",
        f"(Tensor gradient, {_ARGUMENTS}, Tensor output, Tensor normalizer) -> (Tensor, Tensor, Tensor)",
        _attend_backward,
        _empty_gradients,
    ),
    keeps_outputs=True,
)
