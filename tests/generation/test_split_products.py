"""Products of a few rows with weights, in parts of what is summed over: which, and what becomes of them."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from windowlm.generation import split_products
from windowlm.generation.split_products import (
    MOST_PARTS,
    MOST_ROWS,
    TILE_K,
    _parts,
    compile_split_products,
    linear_in_parts,
)


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the inputs whose products are split, as if a GPU were there, without its compiler."""
    shapes: list[tuple[int, ...]] = []

    def recorded(input_RK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
        shapes.append(tuple(input_RK.shape))
        return F.linear(input_RK, weight_NK, bias_N)

    monkeypatch.setattr(split_products, "kernels_run_on", lambda device: True)
    monkeypatch.setattr(split_products, "linear_in_parts", recorded)
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda graph, inputs, config_patches: graph)
    return shapes


def compiled(function: Any) -> Any:
    torch.compiler.reset()
    return torch.compile(function, backend=compile_split_products, fullgraph=True, dynamic=False)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("shape", "dtype", "is_split"),
    [
        ((2, 1), torch.bfloat16, True),
        ((64, 1), torch.float16, True),
        ((MOST_ROWS,), torch.bfloat16, True),
        ((1, 1), torch.bfloat16, False),
        ((MOST_ROWS + 1,), torch.bfloat16, False),
        ((4, 1), torch.float32, False),
    ],
)
def test_products_of_a_few_rows_with_weights_are_split(
    shape: tuple[int, ...], dtype: torch.dtype, is_split: bool, bias: bool, split: list[tuple[int, ...]]
) -> None:
    layer, input_RK = nn.Linear(24, 16, bias=bias).to(dtype), torch.randn(*shape, 24).to(dtype)
    with torch.no_grad():
        assert torch.equal(compiled(layer)(input_RK), layer(input_RK))
    assert split == ([(*shape, 24)] if is_split else [])


def test_products_with_what_the_graph_computes_are_not(split: list[tuple[int, ...]]) -> None:
    # Their kernels read the weights before the kernel in front has ended.
    layer = nn.Linear(24, 16, bias=False).bfloat16()
    with torch.no_grad():
        compiled(lambda input_RK: F.linear(input_RK, layer.weight * 2))(torch.randn(4, 24).bfloat16())
    assert split == []


def test_a_product_with_a_vector_is_not(split: list[tuple[int, ...]]) -> None:
    input_RK, weight_K = torch.randn(4, 24).bfloat16(), torch.randn(24).bfloat16()
    assert torch.equal(compiled(F.linear)(input_RK, weight_K), F.linear(input_RK, weight_K))
    assert split == []


def test_on_a_cpu_nothing_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda graph, inputs, config_patches: graph)
    layer, input_RK = nn.Linear(24, 16).bfloat16(), torch.randn(4, 24).bfloat16()
    with torch.no_grad():
        assert torch.equal(compiled(layer)(input_RK), layer(input_RK))


@pytest.mark.parametrize("outputs", [1, 48, 768, 1280, 4096, 32768])
@pytest.mark.parametrize("inputs", [1, TILE_K - 1, TILE_K, TILE_K + 1, 768, 2048, 12288])
def test_each_part_has_something_to_sum_and_nothing_is_left(outputs: int, inputs: int) -> None:
    parts, tiles_a_part = _parts(outputs, inputs)
    assert 1 <= parts <= MOST_PARTS
    assert (parts - 1) * tiles_a_part * TILE_K < inputs <= parts * tiles_a_part * TILE_K


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_what_the_parts_contribute_is_summed(parts: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Product:
        @staticmethod
        def call(row_RK: Tensor, weight_NK: Tensor) -> Tensor:
            chunks = zip(row_RK.float().chunk(parts, 1), weight_NK.float().chunk(parts, 1), strict=True)
            return torch.stack([row @ weight.T for row, weight in chunks])

    monkeypatch.setattr(split_products, "_product", Product)
    input_RK, weight_NK = torch.randn(3, 5, 24).bfloat16(), torch.randn(16, 24).bfloat16()
    bias_N = torch.randn(16).bfloat16() if bias else None
    got, wanted = linear_in_parts(input_RK, weight_NK, bias_N), F.linear(input_RK, weight_NK, bias_N)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, wanted)
