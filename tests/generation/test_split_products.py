"""Products of a few rows with weights, in parts of what is summed over: which, and what becomes of them."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from windowlm.generation import split_products
from windowlm.generation.split_products import (
    FEWEST_GATED_PROGRAMS,
    MOST_PARTS,
    MOST_ROWS,
    TILE_F,
    TILE_K,
    _parts,
    compile_split_products,
    linear_in_parts,
)
from windowlm.model.feed_forward import FeedForward

ENOUGH_GATED = (FEWEST_GATED_PROGRAMS - 1) * TILE_F + 1


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


@pytest.fixture
def gated(split: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the inputs whose product with gates and ups is one."""
    shapes: list[tuple[int, ...]] = []

    def recorded(input_RK: Tensor, weight_NK: Tensor) -> Tensor:
        shapes.append(tuple(input_RK.shape))
        gate, up = F.linear(input_RK, weight_NK).chunk(2, -1)
        return F.silu(gate) * up

    monkeypatch.setattr(split_products, "gated_linear", recorded)
    return shapes


@pytest.mark.parametrize(
    ("hidden_dim", "rows", "is_gated"),
    [(ENOUGH_GATED, 4, True), (ENOUGH_GATED - 1, 4, False), (ENOUGH_GATED, 1, False)],
)
def test_a_network_of_enough_outputs_takes_gates_and_ups_in_one_product(
    hidden_dim: int, rows: int, is_gated: bool, gated: list[tuple[int, ...]], split: list[tuple[int, ...]]
) -> None:
    layer, input_B1K = FeedForward(24, hidden_dim).bfloat16(), torch.randn(rows, 1, 24).bfloat16()
    layer.join_projections()
    with torch.no_grad():
        assert torch.equal(compiled(layer)(input_B1K), layer(input_B1K))
    assert gated == ([(rows, 1, 24)] if is_gated else [])
    # What goes down is split, as is the product of gates and ups where that is not one with what follows.
    assert len(split) == (0 if rows == 1 else 1 if is_gated else 2)


def _halves(input_RK: Tensor, layer: nn.Linear) -> tuple[Tensor, ...]:
    outputs_RN = layer(input_RK)
    return torch.split(outputs_RN, [outputs_RN.shape[-1] // 2] * 2, dim=-1)


@pytest.mark.parametrize(
    "network",
    [
        lambda gate, up, _: F.silu(up) * gate,
        lambda gate, up, _: F.silu(gate) * gate,
        lambda gate, up, _: F.silu(gate) + up,
        lambda gate, up, other: F.silu(gate) * other,
    ],
)
def test_other_ends_of_such_a_product_are_not_taken_for_it(
    network: Any, gated: list[tuple[int, ...]]
) -> None:
    layer = nn.Linear(24, 2 * ENOUGH_GATED, bias=False).bfloat16()
    input_RK, other_RF = torch.randn(4, 24).bfloat16(), torch.randn(4, ENOUGH_GATED).bfloat16()

    def ended(input_RK: Tensor) -> Any:
        return network(*_halves(input_RK, layer), other_RF)

    with torch.no_grad():
        assert torch.equal(compiled(ended)(input_RK), ended(input_RK))
    assert gated == []


def test_a_product_with_biases_is_not_gated(gated: list[tuple[int, ...]]) -> None:
    layer, input_RK = nn.Linear(24, 2 * ENOUGH_GATED).bfloat16(), torch.randn(4, 24).bfloat16()

    def network(input_RK: Tensor) -> Tensor:
        gate, up = _halves(input_RK, layer)
        return F.silu(gate) * up

    with torch.no_grad():
        assert torch.equal(compiled(network)(input_RK), network(input_RK))
    assert gated == []


def test_a_gate_that_is_wanted_elsewhere_is_there_too(gated: list[tuple[int, ...]]) -> None:
    layer = nn.Linear(24, 2 * ENOUGH_GATED, bias=False).bfloat16()

    def network(input_RK: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = _halves(input_RK, layer)
        activated = F.silu(gate)
        return activated * up, activated

    input_RK = torch.randn(4, 24).bfloat16()
    with torch.no_grad():
        for got, wanted in zip(compiled(network)(input_RK), network(input_RK), strict=True):
            assert torch.equal(got, wanted)
    assert gated == [(4, 24)]


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
