"""Compiles for a GPU with the products of a few rows split along what is summed over.

A product of a few rows takes as long as its weights take to be read, if the whole GPU reads them. Its outputs
make too few tiles for that, unless several programs share each. What these contribute is summed by the kernel
behind, which reads the product anyway (split K; Osama et al. 2023, https://arxiv.org/abs/2301.03598).

Where a feed-forward network's gates and ups are outputs enough, a program takes both of a tile of them, and
what follows from them is no kernel of its own.

Shapes: R rows, N outputs, F gated outputs, K what is summed over, P parts of it.
"""

import math
import operator
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
# A gate and its up are two outputs; fewer programs than these leave too much of a large GPU idle.
TILE_F, FEWEST_GATED_PROGRAMS = 16, 96
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

    for node in list(graph_module.graph.nodes):
        if node.target is F.silu:
            _gate(node)
    for node in graph_module.graph.nodes:
        if node.target is F.linear and not node.kwargs and _has_few_rows(node):
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


def _has_few_rows(linear: torch.fx.Node) -> bool:
    """Whether the weight is given to the graph, and not computed in it, and the rows are few."""
    input_node, weight_node = linear.args[:2]
    assert isinstance(input_node, torch.fx.Node)
    assert isinstance(weight_node, torch.fx.Node)
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


def _gate(silu: torch.fx.Node) -> None:
    """Take silu(gate) * up from one product, where that is what the node begins and outputs are enough."""
    for product in list(silu.users):
        if product.target is not operator.mul or product.args[0] is not silu:
            continue
        before: tuple[Any, ...] = (silu, silu.args[0], product.args[1])
        linear = _linear_in_halves(*before[1:])
        if linear is None or linear.kwargs or linear.args[2:] not in ((), (None,)):
            continue
        programs = -(-product.meta["example_value"].shape[-1] // TILE_F)
        if programs >= FEWEST_GATED_PROGRAMS and _has_few_rows(linear):
            product.target, product.args = gated_linear, linear.args[:2]
            # A graph of dynamo's writes in place, so that not all that nobody reads is dead.
            for node in (*before, before[1].args[0], linear):
                if not node.users:
                    node.graph.erase_node(node)


def _linear_in_halves(first: Any, second: Any) -> torch.fx.Node | None:
    """The product of which these are the halves, if they are."""
    for index, half in enumerate((first, second)):
        if not isinstance(half, torch.fx.Node) or half.target is not operator.getitem:
            return None
        if half.args[1] != index:
            return None
    halves = first.args[0]
    if second.args[0] is not halves or halves.target is not torch.functional.split:
        return None
    parts = halves.meta["example_value"]
    linear: torch.fx.Node = halves.args[0]
    alike = len(parts) == 2 and parts[0].shape == parts[1].shape
    return linear if alike and linear.target is F.linear else None


def gated_linear(input_RK: Tensor, weight_NK: Tensor) -> Tensor:
    """silu(gate) * up of rows [..., K], with weights of gates and ups [2 F, K] that no kernel writes."""
    output_RF: Tensor = _gated_product.call(input_RK.flatten(0, -2), weight_NK)
    return output_RF.view(*input_RK.shape[:-1], -1)


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


def gated_product_by_kernel(row_RK: Tensor, weight_NK: Tensor) -> Tensor:
    """silu(gate) * up, [R, F], in the dtype of the rows."""
    from .split_product_kernel import gated_product_kernel

    output_RF = _no_gated_outputs(row_RK, weight_NK)
    (rows, inputs), gated = row_RK.shape, output_RF.shape[1]
    row_RK = band.rows_contiguous(row_RK)
    gated_product_kernel[(-(-gated // TILE_F),)](
        row_RK, weight_NK, output_RF, row_RK.stride(0), weight_NK.stride(0), rows, gated, inputs,
        TILE_R=band.power_of_two(rows), TILE_F=TILE_F, TILE_K=TILE_K,
        num_warps=WARPS, num_stages=STAGES, **early_start(row_RK.device),
    )  # fmt: skip
    return output_RF


def _no_gated_outputs(row_RK: Tensor, weight_NK: Tensor) -> Tensor:
    return row_RK.new_empty((len(row_RK), len(weight_NK) // 2))


_product = Operator(
    f"{__name__}.product", "(Tensor rows, Tensor weight) -> Tensor", product_by_kernel, _no_parts
)
_gated_product = Operator(
    f"{__name__}.gated_product",
    "(Tensor rows, Tensor weight) -> Tensor",
    gated_product_by_kernel,
    _no_gated_outputs,
)
