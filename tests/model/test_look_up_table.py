"""Embeddings whose gradients are summed in float32."""

import pytest
import torch
import torch.nn.functional as F

from windowlm.model.look_up_table import LookUpTable

ROWS, DIM, TOKENS = 5, 8, 4096


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_gradient_of_a_row_that_is_read_often_is_rounded_once(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    table = LookUpTable(ROWS, DIM).to(dtype)
    rows_T = torch.randint(ROWS, (TOKENS,), generator=generator)
    upstream_TD = (torch.rand(TOKENS, DIM, generator=generator) / 1024).to(dtype)
    found_TD = table(rows_T)
    assert found_TD.dtype == dtype
    assert torch.equal(found_TD, F.embedding(rows_T, table.weight))
    found_TD.backward(upstream_TD)  # type: ignore[no-untyped-call]
    wanted_VD = torch.zeros(ROWS, DIM, dtype=torch.float64).index_add_(0, rows_T, upstream_TD.double())
    assert table.weight.grad is not None
    assert table.weight.grad.dtype == dtype
    # One rounding, and those of float32.
    room = torch.finfo(dtype).eps / 2 + TOKENS * torch.finfo(torch.float32).eps
    assert (table.weight.grad.double() / wanted_VD - 1).abs().max() <= room


def test_without_gradients_no_wide_copy_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    table = LookUpTable(ROWS, DIM).bfloat16()
    monkeypatch.setattr(torch.Tensor, "float", None)
    with torch.no_grad():
        assert table(torch.tensor([1, 2])).shape == (2, DIM)
