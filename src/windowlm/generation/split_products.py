"""Compiles for a GPU with the products of a few rows split along what is summed over.

A product of a few rows takes as long as its weights take to be read, if the whole GPU reads them. Its outputs
make too few tiles for that, unless several programs share each. What these contribute is summed by the kernel
behind, which reads the product anyway (split K; Osama et al. 2023, https://arxiv.org/abs/2301.03598).

Shapes: R rows, N outputs, K what is summed over, P parts of it.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from windowlm.attention.backends import band
from windowlm.attention.operator import Operator
from windowlm.attention.step_attention import early_start, kernels_run_on

DTYPES = (torch.bfloat16, torch.float16)
# One alone becomes a sum; more were not timed.
FEWEST_ROWS, MOST_ROWS = 2, 128
# Measured on an H100 at 64 rows, over weights of 768 to 32,768 outputs that no cache holds.
TILE_N, TILE_K, WARPS, STAGES = 32, 256, 4, 2
# Two for each multiprocessor of a large GPU.
ENOUGH_PROGRAMS = 264
# The kernel behind reads them all.
MOST_PARTS = 8
# Products with one row become sums, kernels that are fused with what stands around them; kernels that do not
# wait for one another become one. Kernels of inductor's do not start early ("triton.enable_pdl"): where one
# reads what the kernel in front writes in place, torch (2.13) lets it do so before it waits.
INDUCTOR_OPTIONS: dict[str, Any] = {
    "coordinate_descent_tuning": True,
    "combo_kernels": True,
}


def compile_split_products(graph_module: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
    """A backend of `torch.compile`: inductor, with such products with weights split."""
    from torch._inductor.compile_fx import compile_fx

    for node in graph_module.graph.nodes:
        if node.target is F.linear and not node.kwargs and _is_split(*node.args):
            node.target = linear_in_parts
    graph_module.recompile()
    return compile_fx(graph_module, example_inputs, config_patches=INDUCTOR_OPTIONS)


def linear_in_parts(input_RK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` of rows [..., K] with weights that no kernel of the graph writes."""
    part_PRN: Tensor = _product.call(input_RK.flatten(0, -2), weight_NK)
    # A sum over a dimension may become a kernel of its own.
    output_RN = sum(part_PRN[1:], part_PRN[0])
    if bias_N is not None:
        output_RN = output_RN + bias_N
    output: Tensor = output_RN.to(input_RK.dtype).unflatten(0, input_RK.shape[:-1])
    return output


def _is_split(input_node: torch.fx.Node, weight_node: torch.fx.Node, *_: Any) -> bool:
    """Whether the weight is given to the graph, and not computed in it, and the rows are few."""
    input_RK, weight_NK = (node.meta["example_value"] for node in (input_node, weight_node))
    rows = math.prod(input_RK.shape[:-1])
    return (
        weight_node.op in ("placeholder", "get_attr")
        and weight_NK.dim() == 2
        and weight_NK.stride(1) == 1
        and input_RK.dtype == weight_NK.dtype
        and input_RK.dtype in DTYPES
        and FEWEST_ROWS <= rows <= MOST_ROWS
        and kernels_run_on(input_RK.device)
    )


def _parts(outputs: int, inputs: int) -> tuple[int, int]:
    """Into how many parts K is split, and how many tiles of it each takes."""
    tiles, most = -(-inputs // TILE_K), max(1, round(ENOUGH_PROGRAMS / -(-outputs // TILE_N)))
    tiles_a_part = -(-tiles // min(tiles, most, MOST_PARTS))
    return -(-tiles // tiles_a_part), tiles_a_part


def product_by_kernel(row_RK: Tensor, weight_NK: Tensor) -> Tensor:
    """What the parts of K contribute to the product, float32 [P, R, N]."""
    from .split_product_kernel import split_product_kernel

    part_PRN = _no_parts(row_RK, weight_NK)
    (rows, inputs), outputs = row_RK.shape, len(weight_NK)
    parts, tiles_a_part = _parts(outputs, inputs)
    row_RK = band.rows_contiguous(row_RK)
    split_product_kernel[-(-outputs // TILE_N), parts](
        row_RK, weight_NK, part_PRN, row_RK.stride(0), weight_NK.stride(0),
        rows, outputs, inputs, tiles_a_part,
        TILE_R=band.power_of_two(rows), TILE_N=TILE_N, TILE_K=TILE_K,
        num_warps=WARPS, num_stages=STAGES, **early_start(row_RK.device),
    )  # fmt: skip
    return part_PRN


def _no_parts(row_RK: Tensor, weight_NK: Tensor) -> Tensor:
    parts, _ = _parts(*weight_NK.shape)
    return row_RK.new_empty((parts, len(row_RK), len(weight_NK)), dtype=torch.float32)


_product = Operator(
    f"{__name__}.product", "(Tensor rows, Tensor weight) -> Tensor", product_by_kernel, _no_parts
)
