"""Output head and cross-entropy in one, a few tokens at a time, so that no logits are kept.

The gradient of each token's logits is known as soon as its loss is, so it is spent on the spot: the forward
pass leaves the gradients of the summed loss, the backward pass multiplies them by one number. Logits of all
tokens, [N, V], are the largest tensor of training otherwise (as in Liger, Hsu et al. 2024, arXiv:2410.10989;
here the gradient of the weights adds up in float32, and nothing is read back from the device).

Shapes: N tokens, D model width, V vocabulary, C tokens of a piece.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from windowlm.model.head import capped

# Few enough to be read again from the caches on a CPU; on a GPU enough for products at full speed.
LOGITS_AT_ONCE = {"cpu": 2**21}
LOGITS_AT_ONCE_ELSEWHERE = 2**27
HeadLoss = Callable[..., tuple[Tensor, Tensor]]


def head_loss(kind: Literal["auto", "pieces", "whole"], precision: str, *, compiled: bool) -> HeadLoss:
    """`linear_cross_entropy`, or `cross_entropy_of_logits` where asked for or float16 needs it.

    Float16's gradients of logits would vanish before the scaled loss multiplies them.

    Args:
        kind: of the settings.
        precision: of the run.
        compiled: compile what stands between the matrix products.
    """
    if kind == "whole" or (kind == "auto" and precision == "16-mixed"):
        return cross_entropy_of_logits
    return partial(linear_cross_entropy, compiled=compiled)


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    unscored: int,
    logit_cap: float | None = None,
    tokens_at_once: int | None = None,
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """`-log softmax(hidden @ weight.T)[target]`, summed and of each token.

    Products are taken in the dtype of `hidden_ND`, or autocast's; softmax and sums in at least float32.

    Args:
        hidden_ND: [N, D].
        weight_VD: [V, D].
        targets_N: int64 [N]; `unscored` where there is no target.
        unscored: the negative number that stands for no target.
        logit_cap: c of logits l that become `c * tanh(l / c)`, as `model.head` has them; None for not.
        tokens_at_once: C, tokens whose logits exist at one time; None for what suits the device.
        compiled: compile what stands between the matrix products, so that logits are read no more often than
            a softmax must.

    Returns:
        The sum, a scalar, which carries the gradient, and nats [N], which do not; 0 where there is no target.
    """
    device = hidden_ND.device.type
    if tokens_at_once is None:
        logits_at_once = LOGITS_AT_ONCE.get(device, LOGITS_AT_ONCE_ELSEWHERE)
        tokens_at_once = max(1, logits_at_once // len(weight_VD))
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else hidden_ND.dtype
    with torch.autocast(device, enabled=False) if autocast else nullcontext():
        summed, nats_N = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden_ND.to(dtype),
            weight_VD,
            targets_N,
            unscored,
            logit_cap,
            tokens_at_once,
            torch.is_grad_enabled(),
            compiled,
        )
    return summed, nats_N


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        unscored: int,
        logit_cap: float | None,
        tokens_at_once: int,
        with_gradients: bool,
        compiled: bool,
    ) -> tuple[Tensor, Tensor]:
        # Of parameters also true where no gradient is recorded, as in a validation.
        wanted = [with_gradients and needed for needed in context.needs_input_grad[:2]]
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        cast_VD = weight_VD.to(hidden_ND.dtype)
        nats_N = hidden_ND.new_empty(len(hidden_ND), dtype=wide)
        hidden_gradient_ND = torch.empty_like(hidden_ND) if wanted[0] else None
        weight_gradient_VD = torch.zeros_like(weight_VD, dtype=wide) if wanted[1] else None
        nats_of, nats_and_gradient = _compiled_pieces() if compiled else (_nats, _nats_and_gradient)
        room_CV = cast_VD.new_empty(min(len(hidden_ND), tokens_at_once), len(cast_VD))
        for start in range(0, len(hidden_ND), tokens_at_once):
            piece = slice(start, start + tokens_at_once)
            hidden_CD = hidden_ND[piece]
            # Memory that is new for each piece costs a CPU more than reading it.
            logits_CV = torch.mm(hidden_CD, cast_VD.mT, out=room_CV[: len(hidden_CD)])
            if not any(wanted):
                nats_N[piece] = nats_of(logits_CV, targets_N[piece], unscored, logit_cap)
                continue
            nats_N[piece], gradient_CV = nats_and_gradient(logits_CV, targets_N[piece], unscored, logit_cap)
            if hidden_gradient_ND is not None:
                torch.mm(gradient_CV, cast_VD, out=hidden_gradient_ND[piece])
            if weight_gradient_VD is not None:
                _add_product(weight_gradient_VD, gradient_CV.mT, hidden_CD)
        context.save_for_backward(hidden_gradient_ND, weight_gradient_VD)
        context.weight_dtype = weight_VD.dtype
        context.mark_non_differentiable(nats_N)
        return nats_N.sum(), nats_N

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden_gradient_ND, weight_gradient_VD = context.saved_tensors
        if hidden_gradient_ND is not None:
            hidden_gradient_ND = hidden_gradient_ND * gradient
        if weight_gradient_VD is not None:
            weight_gradient_VD = (weight_gradient_VD * gradient).to(context.weight_dtype)
        return (hidden_gradient_ND, weight_gradient_VD, *(None,) * 6)


def _nats(logits_CV: Tensor, targets_C: Tensor, unscored: int, logit_cap: float | None) -> Tensor:
    wide_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    if logit_cap is not None:
        wide_CV = capped(wide_CV, logit_cap)
    unscored_C = targets_C == unscored
    chosen_C = wide_CV.gather(1, targets_C.masked_fill(unscored_C, 0)[:, None])[:, 0]
    return (wide_CV.logsumexp(1) - chosen_C).masked_fill(unscored_C, 0.0)


def _nats_and_gradient(
    logits_CV: Tensor, targets_C: Tensor, unscored: int, logit_cap: float | None
) -> tuple[Tensor, Tensor]:
    """The nats of each token, and the gradient of their sum with respect to the logits, in their dtype.

    In place where it can be: each further copy of the logits would not fit the caches.
    """
    wide_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    tanh_CV = None
    if logit_cap is not None:
        tanh_CV = wide_CV.div_(logit_cap).tanh_()
        wide_CV = tanh_CV * logit_cap
    scored_C = targets_C != unscored
    target_C1 = targets_C.masked_fill(~scored_C, 0)[:, None]
    largest_C, chosen_C = wide_CV.amax(1), wide_CV.gather(1, target_C1)[:, 0]
    gradient_CV = torch.softmax(wide_CV, 1, out=wide_CV)
    # The probability of the largest logit is never too small for its logarithm.
    nats_C = largest_C - chosen_C - gradient_CV.amax(1).log()
    minus_one_C1 = -torch.ones_like(target_C1, dtype=wide_CV.dtype)
    gradient_CV.scatter_add_(1, target_C1, minus_one_C1).mul_(scored_C[:, None])
    if tanh_CV is not None:
        gradient_CV.mul_(tanh_CV.square_().neg_().add_(1))
    return nats_C.masked_fill(~scored_C, 0.0), gradient_CV.to(logits_CV.dtype)


def _fused_nats_and_gradient(
    logits_CV: Tensor, targets_C: Tensor, unscored: int, logit_cap: float | None
) -> tuple[Tensor, Tensor]:
    """The same without scattered writes, which a compiler could not fuse."""
    wide_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    slope_CV = None
    if logit_cap is not None:
        tanh_CV = torch.tanh(wide_CV / logit_cap)
        wide_CV, slope_CV = tanh_CV * logit_cap, 1 - tanh_CV.square()
    scored_C = targets_C != unscored
    target_C1 = targets_C.masked_fill(~scored_C, 0)[:, None]
    normalizer_C1 = wide_CV.logsumexp(1, keepdim=True)
    nats_C = (normalizer_C1 - wide_CV.gather(1, target_C1))[:, 0].masked_fill(~scored_C, 0.0)
    one_hot_CV = torch.arange(logits_CV.shape[1], device=logits_CV.device) == target_C1
    gradient_CV = ((wide_CV - normalizer_C1).exp() - one_hot_CV.to(wide_CV.dtype)) * scored_C[:, None]
    if slope_CV is not None:
        gradient_CV = gradient_CV * slope_CV
    return nats_C, gradient_CV.to(logits_CV.dtype)


@cache
def _compiled_pieces() -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor]]]:
    return torch.compile(_nats), torch.compile(_fused_nats_and_gradient)


def _add_product(sum_VD: Tensor, gradient_VC: Tensor, hidden_CD: Tensor) -> None:
    """Add a product to a sum of wider dtype without rounding the product first."""
    if sum_VD.dtype == hidden_CD.dtype:
        sum_VD.addmm_(gradient_VC, hidden_CD)
    elif sum_VD.device.type == "cuda":
        torch.addmm(sum_VD, gradient_VC, hidden_CD, out_dtype=sum_VD.dtype, out=sum_VD)
    else:
        sum_VD.addmm_(gradient_VC.to(sum_VD.dtype), hidden_CD.to(sum_VD.dtype))


def cross_entropy_of_logits(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    unscored: int,
    logit_cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The same with all logits at once: the plain path, and that of float16."""
    logits_NV = F.linear(hidden_ND, weight_VD)
    wide_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    if logit_cap is not None:
        wide_NV = capped(wide_NV, logit_cap)
    nats_N = F.cross_entropy(wide_NV, targets_N, ignore_index=unscored, reduction="none")
    return nats_N.sum(), nats_N.detach()
