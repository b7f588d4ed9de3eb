"""Products of few rows, written as sums, are those of torch's matrix product."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from windowlm.generation.row_products import MOST_ROWS, MOST_ROWS_OF_A_BATCH, compile_row_products


def products(row_RK: Tensor, weight_NK: Tensor, keys_MKS: Tensor) -> tuple[Tensor, Tensor]:
    """What a step of a token takes: a product behind an activation, and products of a batch."""
    return F.linear(F.silu(row_RK), weight_NK), row_RK.expand(len(keys_MKS), -1, -1) @ keys_MKS


@pytest.mark.parametrize(
    ("rows", "inputs", "dtype"),
    [
        (1, 63, torch.float32),
        (1, 100, torch.bfloat16),
        (MOST_ROWS, 100, torch.float32),
        (MOST_ROWS + 1, 63, torch.float32),
        (MOST_ROWS_OF_A_BATCH + 1, 63, torch.float32),
    ],
)
def test_they_equal_the_matrix_product(rows: int, inputs: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    drawn = [torch.randn(rows, inputs), torch.randn(65, inputs), torch.randn(3, inputs, 31)]
    given = [tensor.to(dtype) for tensor in drawn]
    torch.compiler.reset()
    compiled = torch.compile(products, backend=compile_row_products, dynamic=False)
    with torch.no_grad():
        found, (code,) = run_and_get_code(compiled, *given)
        plain, exact = products(*given), products(*(tensor.double() for tensor in given))
    for got, usual, wanted in zip(found, plain, exact, strict=True):
        assert got.dtype == dtype
        assert (got.double() - wanted).norm() <= 2 * (usual.double() - wanted).norm() + 1e-7 * wanted.norm()
    assert ("extern_kernels.mm(" in code) == (rows > MOST_ROWS)
    assert ("extern_kernels.bmm(" in code) == (rows > MOST_ROWS_OF_A_BATCH)
