"""What gradients may err where scores are large, and weights are computed again from rounded denominators."""

import pytest
import torch
from torch import Tensor

from windowlm.attention.dispatch import attention
from windowlm.attention.window import Visibility


def heads(tokens: int, count: int, dim: int) -> Tensor:
    generator = torch.Generator().manual_seed(tokens + 10 * count)
    return torch.randn(1, tokens, count, dim, generator=generator)


# The root of 64 is exact, that of 32 is not.
@pytest.mark.parametrize("dim", [32, 64])
@pytest.mark.parametrize("size", [1.0, 3.0])
@pytest.mark.parametrize(
    ("tokens", "window", "causal"),
    [(63, None, True), (63, None, False), (300, None, False), (900, None, True), (900, 500, True)],
)
def test_gradients_err_at_most_twice_as_much_as_the_formula(
    tokens: int, window: int | None, causal: bool, size: float, dim: int
) -> None:
    visibility = Visibility.build(window=window, causal=causal)
    tensors = [size * heads(tokens, 2, dim), size * heads(tokens, 1, dim), heads(tokens, 1, dim).cos()]
    gradient = heads(tokens, 2, dim).sin()

    def results(backend: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
        output = attention(*leaves, visibility, backend=backend)
        of_leaves = torch.autograd.grad(output, leaves, gradient.to(dtype))
        return [tensor.detach().double() for tensor in (output, *of_leaves)]

    ours, plain, exact = (
        results(backend, dtype)
        for backend, dtype in (
            ("banded", torch.float32),
            ("reference", torch.float32),
            ("reference", torch.float64),
        )
    )
    for got, usual, expected in zip(ours, plain, exact, strict=True):
        assert (got - expected).norm() <= 2 * (usual - expected).norm()
