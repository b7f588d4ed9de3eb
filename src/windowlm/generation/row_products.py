"""Compiles for a CPU with the products of a row or two as sums, which read the weights at the pace of memory.

The matrix product of the library that torch calls reads them at a half to a third of it.

Shapes: R rows, M, N any size, K what is summed over.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Measured: with more, one matrix product is as fast as so many sums.
MOST_ROWS, MOST_ROWS_OF_A_BATCH = 2, 4


def compile_row_products(graph_module: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
    """A backend of `torch.compile`: inductor, with such products written as sums."""
    from torch._functorch import config
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import select_decomp_table

    written: dict[Any, Callable[..., Any]] = dict(select_decomp_table())
    product, products = torch.ops.aten.mm.default, torch.ops.aten.bmm.default
    product_otherwise, products_otherwise = written[product], written[products]

    def row_product(row_RK: Tensor, weight_KN: Tensor) -> Tensor:
        if len(row_RK) > MOST_ROWS:
            return product_otherwise(row_RK, weight_KN)  # type: ignore[no-any-return]
        return (_computed_once(row_RK)[:, :, None] * weight_KN).sum(1)

    def row_products(row_MRK: Tensor, weight_MKN: Tensor) -> Tensor:
        if row_MRK.shape[1] > MOST_ROWS_OF_A_BATCH:
            return products_otherwise(row_MRK, weight_MKN)  # type: ignore[no-any-return]
        return (_computed_once(row_MRK)[..., None] * weight_MKN[:, None]).sum(2)

    written |= {product: row_product, products: row_products}
    # The key of that cache leaves out how operators are written.
    with config.patch(enable_autograd_cache=False):
        return compile_fx(graph_module, example_inputs, decompositions=written)


def _computed_once(tensor: Tensor) -> Tensor:
    """The same, not computed again for each of the sums."""
    dense = tensor.contiguous()
    once: Tensor = torch.ops.prims.inductor_force_stride_order(dense, dense.stride())
    return once
