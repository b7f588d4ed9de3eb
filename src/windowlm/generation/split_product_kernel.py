"""Triton kernels of products of a few rows with a weight: split along what is summed over, or gated.

Shapes: R rows, N outputs, F gated outputs, K what is summed over, of a tile each.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["steps"])
def split_product_kernel(
    row_ptr, weight_ptr, part_ptr, row_r, weight_n, R, N, K, steps,
    TILE_R: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """What one part of K contributes to a tile of outputs of all rows.

    Where it may start before the kernel in front has ended, it waits for that one with its first weights at
    hand: no kernel of a step writes them.
    """
    tile, part = tl.program_id(0), tl.program_id(1)
    place_R, place_K = tl.arange(0, TILE_R), tl.arange(0, TILE_K)
    place_N = tile * TILE_N + tl.arange(0, TILE_N)
    begin = part * steps * TILE_K
    end = tl.minimum(begin + steps * TILE_K, K)
    real_R, real_N = place_R[:, None] < R, place_N[:, None] < N
    rows = row_ptr + place_R[:, None] * row_r + place_K[None, :]
    # A vocabulary's weights may be more numbers than 32 bits can count.
    weights = weight_ptr + place_N[:, None].to(tl.int64) * weight_n + place_K[None, :]
    weight_NK = tl.load(weights + begin, mask=real_N & (begin + place_K < end)[None, :], other=0.0)
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    sum_RN = tl.zeros([TILE_R, TILE_N], tl.float32)
    for start in range(begin, end, TILE_K):
        row_RK = tl.load(rows + start, mask=real_R & (start + place_K < end)[None, :], other=0.0)
        next_weight_NK = tl.load(
            weights + start + TILE_K, mask=real_N & (start + TILE_K + place_K < end)[None, :], other=0.0
        )
        sum_RN = tl.dot(row_RK, tl.trans(weight_NK), sum_RN)
        weight_NK = next_weight_NK
    at_RN = (part * R + place_R[:, None]) * N + place_N[None, :]
    tl.store(part_ptr + at_RN, sum_RN, mask=real_R & (place_N[None, :] < N))


@triton.jit
def gated_product_kernel(
    row_ptr, weight_ptr, output_ptr, row_r, weight_n, R, F, K,
    TILE_R: tl.constexpr, TILE_F: tl.constexpr, TILE_K: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """silu(gate) * up of a tile of gates, which the weight holds first, and of their ups; it waits alike.

    A program sums over all of K, and has the weights of two tiles of it on their way while it takes a third.
    """
    place_R, place_K = tl.arange(0, TILE_R), tl.arange(0, TILE_K)
    place_F = tl.program_id(0) * TILE_F + tl.arange(0, TILE_F)
    real_R, real_F = place_R[:, None] < R, place_F[:, None] < F
    rows = row_ptr + place_R[:, None] * row_r + place_K[None, :]
    gates = weight_ptr + place_F[:, None].to(tl.int64) * weight_n + place_K[None, :]
    ups = gates + tl.cast(F, tl.int64) * weight_n
    wanted_FK = real_F & (place_K < K)[None, :]
    gate_FK, up_FK = tl.load(gates, mask=wanted_FK, other=0.0), tl.load(ups, mask=wanted_FK, other=0.0)
    wanted_FK = real_F & (TILE_K + place_K < K)[None, :]
    next_gate_FK = tl.load(gates + TILE_K, mask=wanted_FK, other=0.0)
    next_up_FK = tl.load(ups + TILE_K, mask=wanted_FK, other=0.0)
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    gate_RF, up_RF = tl.zeros([TILE_R, TILE_F], tl.float32), tl.zeros([TILE_R, TILE_F], tl.float32)
    for start in range(0, K, TILE_K):
        row_RK = tl.load(rows + start, mask=real_R & (start + place_K < K)[None, :], other=0.0)
        after = start + 2 * TILE_K
        wanted_FK = real_F & (after + place_K < K)[None, :]
        after_gate_FK = tl.load(gates + after, mask=wanted_FK, other=0.0)
        after_up_FK = tl.load(ups + after, mask=wanted_FK, other=0.0)
        gate_RF = tl.dot(row_RK, tl.trans(gate_FK), gate_RF)
        up_RF = tl.dot(row_RK, tl.trans(up_FK), up_RF)
        gate_FK, next_gate_FK = next_gate_FK, after_gate_FK
        up_FK, next_up_FK = next_up_FK, after_up_FK
    activated_RF = gate_RF * tl.sigmoid(gate_RF) * up_RF
    at_RF = place_R[:, None] * F + place_F[None, :]
    wanted_RF = real_R & (place_F[None, :] < F)
    tl.store(output_ptr + at_RF, activated_RF.to(output_ptr.dtype.element_ty), mask=wanted_RF)
