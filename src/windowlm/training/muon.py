"""Muon for the hidden matrices and AdamW for the rest, as one optimizer.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) replaces the averaged gradient of a
matrix by the nearest orthogonal matrix, found by Newton-Schulz iterations. torch.optim.Muon computes the same
matrix by matrix; here those of one shape share batched products. Of matrices whose rows are shared out among
processes (FSDP2) each keeps and updates its rows; the averaged gradients are gathered, those of one shape at
once, and every process orthogonalises the whole.

Shapes: M matrices of one shape, R rows, C columns, R <= C.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor

from windowlm.training.sharded_model import gathered_rows, local, own_rows

# Of the quintic that drives singular values into about [0.7, 1.2] within five steps (Jordan et al. 2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
# That of AdamW's updates, to which Muon's are scaled (Liu et al. 2025, arXiv:2502.16982).
UPDATE_ROOT_MEAN_SQUARE = 0.2
SMALLEST_NORM = 1e-7


class MuonAdamW(torch.optim.Optimizer):
    """Muon over `matrices`; AdamW over `groups`, as `torch.optim.AdamW` takes them.

    One object, so that clipping, accumulation and checkpoints see one optimizer. Each matrix is
    orthogonalised apart: give query, key and value as three. As in torch's fused optimizers, an attribute
    ``found_inf``, a float32 scalar on their device, leaves parameters and state as they are where it is 1;
    AdamW must then be fused.

    Args:
        matrices: two-dimensional parameters, whose group comes first in `param_groups`.
        groups: parameter groups for AdamW.
        muon_lr: learning rate of the matrices; comparable to AdamW's, as updates are scaled alike.
        momentum: decay of the running mean of the gradients, looked ahead as by Nesterov.
        weight_decay: decoupled, of the matrices.
        adamw: further arguments of `torch.optim.AdamW`.
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        groups: list[dict[str, Any]],
        *,
        muon_lr: float,
        momentum: float,
        weight_decay: float,
        **adamw: Any,
    ) -> None:
        matrices = list(matrices)
        assert matrices
        assert all(matrix.ndim == 2 for matrix in matrices)
        self._adamw = torch.optim.AdamW(groups, **adamw)
        of_matrices = {
            "params": matrices,
            "lr": muon_lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "muon": True,
        }
        super().__init__([of_matrices, *({**group, "muon": False} for group in self._adamw.param_groups)], {})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        for group in self.param_groups:
            if group["muon"]:
                self._update_matrices(group, found_inf)
        # A checkpoint that is loaded replaces both.
        self._adamw.param_groups = [group for group in self.param_groups if not group["muon"]]
        self._adamw.state = self.state
        if found_inf is not None:
            self._adamw.found_inf = found_inf  # type: ignore[attr-defined]
        self._adamw.step()
        return loss

    def _update_matrices(self, group: dict[str, Any], found_inf: Tensor | None) -> None:
        by_shape: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
        for matrix in group["params"]:
            if matrix.grad is not None:
                by_shape[(matrix.shape, matrix.dtype, matrix.device)].append(matrix)
        for matrices in by_shape.values():
            gradients = [local(matrix.grad) for matrix in matrices if matrix.grad is not None]
            means = [local(self._mean(matrix)) for matrix in matrices]
            kept = 1 - group["lr"] * group["weight_decay"]
            decay: Tensor | float = kept
            left_out = found_inf.bool() if found_inf is not None else None
            if left_out is not None:
                # A mean that moves towards itself stays to the bit.
                gradients = list(torch.where(left_out, torch.stack(means), torch.stack(gradients)).unbind())
                decay = torch.full((), kept, dtype=means[0].dtype, device=means[0].device)
                decay.masked_fill_(left_out, 1)
            torch._foreach_lerp_(means, gradients, 1 - group["momentum"])
            ahead = torch._foreach_lerp(gradients, means, group["momentum"])
            ahead_MRC = gathered_rows(torch.stack(tuple(ahead)), like=matrices[0])
            orthogonal_MRC = own_rows(orthogonalize(ahead_MRC), like=matrices[0])
            if left_out is not None:
                orthogonal_MRC = orthogonal_MRC.masked_fill(left_out, 0)
            rows, columns = matrices[0].shape
            # An orthogonal matrix has a root mean square of max(rows, columns) ** -0.5.
            scale = UPDATE_ROOT_MEAN_SQUARE * max(rows, columns) ** 0.5
            parts = [local(matrix) for matrix in matrices]
            torch._foreach_mul_(parts, decay)
            updates = list(orthogonal_MRC.to(parts[0].dtype).unbind())
            torch._foreach_add_(parts, updates, alpha=-group["lr"] * scale)

    def _mean(self, matrix: Tensor) -> Tensor:
        state = self.state[matrix]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(matrix)
        mean: Tensor = state["momentum"]
        return mean


def orthogonalize(gradients_MRC: Tensor) -> Tensor:
    """U V' of each matrix U S V', up to singular values between about 0.7 and 1.2, [M, R, C] of any R and C.

    Products are taken in bfloat16 on a GPU, which suffices, and in the gradients' own dtype on a CPU.
    """
    dtype = torch.bfloat16 if gradients_MRC.device.type == "cuda" else gradients_MRC.dtype
    if gradients_MRC.shape[1] > gradients_MRC.shape[2]:
        transposed: Tensor = orthogonalize(gradients_MRC.mT).mT
        return transposed
    first, third, fifth = COEFFICIENTS
    matrix_MRC: Tensor = gradients_MRC / torch.linalg.matrix_norm(gradients_MRC, keepdim=True).clamp(
        SMALLEST_NORM
    )
    matrix_MRC = matrix_MRC.to(dtype)
    for _ in range(STEPS):
        square_MRR = matrix_MRC @ matrix_MRC.mT
        polynomial_MRR = torch.baddbmm(square_MRR, square_MRR, square_MRR, beta=third, alpha=fifth)
        matrix_MRC = torch.baddbmm(matrix_MRC, polynomial_MRR, matrix_MRC, beta=first)
    return matrix_MRC
