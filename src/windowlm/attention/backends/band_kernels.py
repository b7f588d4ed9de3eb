"""Triton kernels of windowed attention, with tiles that start where the window starts.

A tile of queries holds `PACK` query heads of one key-value head beside each other in its rows, so that a
key read once serves all of them and the tile spans few positions: with W = 128 and eight heads, 128 rows are
16 positions that together see 143 keys, where a tile of 128 positions of one head sees 255.

Softmax runs online in base 2 (Milakov and Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022,
arXiv:2205.14135). The backward recomputes the weights, once by tiles of queries for the gradient of the
query and once by tiles of keys for those of key and value, so that nothing is added atomically and results
do not depend on the order of execution.

Shapes: R rows of a tile (positions x packed heads), N keys of a tile, D head dimension, M queries of a tile.
"""

import triton
import triton.language as tl

# Numbers of which no value deserves a kernel of its own: another length or window compiles nothing anew.
SIZES = ["T", "S", "window", "heads", "kv_heads", "group_size"]


@triton.jit
def _tile_and_row(tiles):
    """Which tile of which head and row of the batch: CUDA's second axis would end at 65,535 of the latter."""
    return tl.program_id(0) % tiles, tl.program_id(0) // tiles


@triton.jit
def _row_places(tile, batch, group, heads, T, R: tl.constexpr, PACK: tl.constexpr):
    """Position, head and validity of each row of a tile of queries."""
    row_R = tl.arange(0, R)
    position_R = tile * (R // PACK) + row_R // PACK
    head_R = group * PACK + row_R % PACK
    return position_R, head_R, position_R < T


@triton.jit
def _first_keys(first_ptr, batch, position_R, inside_R, at_R, T, S, window, BOUNDED: tl.constexpr):
    """First key that each row sees; beyond all keys where it sees none."""
    if BOUNDED:
        first_R = tl.load(first_ptr + batch.to(tl.int64) * T + position_R, mask=inside_R, other=S)
    else:
        first_R = tl.where(inside_R, tl.maximum(at_R - window + 1, 0), S)
    return first_R


@triton.jit
def _full_keys(first_R, inside_R, first_at, gaps_ptr, BOUNDED: tl.constexpr):
    """Range of keys that every row of the tile sees; empty where padding stands inside documents."""
    full_from = tl.max(tl.where(inside_R, first_R, 0), 0)
    full_to = first_at + 1
    if BOUNDED:
        full_to = tl.where(tl.load(gaps_ptr) == 0, full_to, -1)
    return full_from, full_to


@triton.jit
def _visible(key_N, exists_N, at_R, first_R, last_ptr, long_batch, S, BOUNDED: tl.constexpr):
    """Whether each row sees each key."""
    visible_RN = (key_N[None, :] <= at_R[:, None]) & (key_N[None, :] >= first_R[:, None])
    if BOUNDED:
        last_N = tl.load(last_ptr + long_batch * S + key_N, mask=exists_N, other=-1)
        visible_RN = visible_RN & (at_R[:, None] <= last_N[None, :])
    return visible_RN


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    query_ptr, key_ptr, value_ptr, output_ptr, normalizer_ptr, first_ptr, last_ptr, gaps_ptr,
    query_b, query_t, query_h, key_b, key_s, key_h, value_b, value_s, value_h, output_b, output_t, output_h,
    heads, group_size, T, S, window, scale_log2,
    D: tl.constexpr, DIM: tl.constexpr, R: tl.constexpr, N: tl.constexpr, PACK: tl.constexpr,
    BOUNDED: tl.constexpr, MOSTLY_FULL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Outputs and log2 of the softmax's denominators of one tile of queries."""
    tile, row = _tile_and_row(tl.cdiv(T, R // PACK))
    groups = heads // PACK
    batch, group = row // groups, row % groups
    kv_head = group * PACK // group_size
    position_R, head_R, inside_R = _row_places(tile, batch, group, heads, T, R, PACK)
    at_R = position_R + (S - T)
    dim_D = tl.arange(0, DIM)
    real_D = dim_D < D
    start_t = tile * (R // PACK)
    query_base = query_ptr + batch.to(tl.int64) * query_b + start_t.to(tl.int64) * query_t
    query_RD = tl.load(
        query_base + ((position_R - start_t) * query_t + head_R * query_h)[:, None] + dim_D[None, :],
        mask=inside_R[:, None] & real_D[None, :],
        other=0.0,
    )
    first_R = _first_keys(first_ptr, batch, position_R, inside_R, at_R, T, S, window, BOUNDED)
    start = tl.min(first_R, 0)
    stop = tl.minimum(start_t + R // PACK + (S - T), S)
    full_from, full_to = _full_keys(first_R, inside_R, start_t + (S - T), gaps_ptr, BOUNDED)
    key_base = key_ptr + batch.to(tl.int64) * key_b + kv_head * key_h
    value_base = value_ptr + batch.to(tl.int64) * value_b + kv_head * value_h
    largest_R = tl.full([R], float("-inf"), tl.float32)
    total_R = tl.zeros([R], tl.float32)
    mixed_RD = tl.zeros([R, DIM], tl.float32)
    for begin in tl.range(start, stop, N, num_stages=STAGES):
        key_N = begin + tl.arange(0, N)
        exists_N = key_N < stop
        step_N = tl.arange(0, N)
        key_DN = tl.load(
            key_base + tl.cast(begin, tl.int64) * key_s + step_N[None, :] * key_s + dim_D[:, None],
            mask=exists_N[None, :] & real_D[:, None],
            other=0.0,
        )
        score_RN = tl.dot(query_RD, key_DN) * scale_log2
        if MOSTLY_FULL:
            if (begin < full_from) | (begin + N > full_to):
                visible_RN = _visible(
                    key_N, exists_N, at_R, first_R, last_ptr, batch.to(tl.int64), S, BOUNDED
                )
                score_RN = tl.where(visible_RN, score_RN, float("-inf"))
        else:
            visible_RN = _visible(key_N, exists_N, at_R, first_R, last_ptr, batch.to(tl.int64), S, BOUNDED)
            score_RN = tl.where(visible_RN, score_RN, float("-inf"))
        new_largest_R = tl.maximum(largest_R, tl.max(score_RN, 1))
        # A row that has seen nothing yet has no largest score to subtract.
        shift_R = tl.where(new_largest_R == float("-inf"), 0.0, new_largest_R)
        weight_RN = tl.exp2(score_RN - shift_R[:, None])
        shrink_R = tl.exp2(largest_R - shift_R)
        total_R = total_R * shrink_R + tl.sum(weight_RN, 1)
        value_ND = tl.load(
            value_base + tl.cast(begin, tl.int64) * value_s + step_N[:, None] * value_s + dim_D[None, :],
            mask=exists_N[:, None] & real_D[None, :],
            other=0.0,
        )
        mixed_RD = mixed_RD * shrink_R[:, None]
        mixed_RD = tl.dot(weight_RN.to(value_ND.dtype), value_ND, mixed_RD)
        largest_R = new_largest_R
    seen_R = total_R > 0
    mixed_RD = mixed_RD / tl.where(seen_R, total_R, 1.0)[:, None]
    output_base = output_ptr + batch.to(tl.int64) * output_b + start_t.to(tl.int64) * output_t
    tl.store(
        output_base + ((position_R - start_t) * output_t + head_R * output_h)[:, None] + dim_D[None, :],
        mixed_RD.to(output_ptr.dtype.element_ty),
        mask=inside_R[:, None] & real_D[None, :],
    )
    # Infinite where nothing is seen, which makes every weight of the row zero in the backward.
    normalizer_R = tl.where(seen_R, largest_R + tl.log2(tl.where(seen_R, total_R, 1.0)), float("inf"))
    tl.store(
        normalizer_ptr + (batch.to(tl.int64) * heads + head_R) * T + position_R, normalizer_R, mask=inside_R
    )


@triton.jit(do_not_specialize=SIZES)
def query_gradient_kernel(
    query_ptr, key_ptr, value_ptr, output_ptr, gradient_ptr, query_gradient_ptr, normalizer_ptr, delta_ptr,
    first_ptr, last_ptr, gaps_ptr,
    query_b, query_t, query_h, key_b, key_s, key_h, value_b, value_s, value_h, output_b, output_t, output_h,
    gradient_b, gradient_t, gradient_h, dquery_b, dquery_t, dquery_h,
    heads, group_size, T, S, window, scale, scale_log2,
    D: tl.constexpr, DIM: tl.constexpr, R: tl.constexpr, N: tl.constexpr, PACK: tl.constexpr,
    BOUNDED: tl.constexpr, MOSTLY_FULL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of queries; leaves each row's output times gradient for the other kernel."""
    tile, row = _tile_and_row(tl.cdiv(T, R // PACK))
    groups = heads // PACK
    batch, group = row // groups, row % groups
    kv_head = group * PACK // group_size
    position_R, head_R, inside_R = _row_places(tile, batch, group, heads, T, R, PACK)
    at_R = position_R + (S - T)
    dim_D = tl.arange(0, DIM)
    real_D = dim_D < D
    start_t = tile * (R // PACK)
    mask_RD = inside_R[:, None] & real_D[None, :]
    local_R = position_R - start_t
    long_batch, long_t = batch.to(tl.int64), start_t.to(tl.int64)
    query_RD = tl.load(
        query_ptr + long_batch * query_b + long_t * query_t
        + (local_R * query_t + head_R * query_h)[:, None] + dim_D[None, :],
        mask=mask_RD, other=0.0,
    )  # fmt: skip
    gradient_RD = tl.load(
        gradient_ptr + long_batch * gradient_b + long_t * gradient_t
        + (local_R * gradient_t + head_R * gradient_h)[:, None] + dim_D[None, :],
        mask=mask_RD, other=0.0,
    )  # fmt: skip
    output_RD = tl.load(
        output_ptr + long_batch * output_b + long_t * output_t
        + (local_R * output_t + head_R * output_h)[:, None] + dim_D[None, :],
        mask=mask_RD, other=0.0,
    )  # fmt: skip
    delta_R = tl.sum(output_RD.to(tl.float32) * gradient_RD.to(tl.float32), 1)
    row_offset_R = (long_batch * heads + head_R) * T + position_R
    tl.store(delta_ptr + row_offset_R, delta_R, mask=inside_R)
    normalizer_R = tl.load(normalizer_ptr + row_offset_R, mask=inside_R, other=float("inf"))
    first_R = _first_keys(first_ptr, batch, position_R, inside_R, at_R, T, S, window, BOUNDED)
    start = tl.min(first_R, 0)
    stop = tl.minimum(start_t + R // PACK + (S - T), S)
    full_from, full_to = _full_keys(first_R, inside_R, start_t + (S - T), gaps_ptr, BOUNDED)
    key_base = key_ptr + long_batch * key_b + kv_head * key_h
    value_base = value_ptr + long_batch * value_b + kv_head * value_h
    query_gradient_RD = tl.zeros([R, DIM], tl.float32)
    for begin in tl.range(start, stop, N, num_stages=STAGES):
        step_N = tl.arange(0, N)
        key_N = begin + step_N
        exists_N = key_N < stop
        mask_ND = exists_N[:, None] & real_D[None, :]
        key_ND = tl.load(
            key_base + tl.cast(begin, tl.int64) * key_s + step_N[:, None] * key_s + dim_D[None, :],
            mask=mask_ND, other=0.0,
        )  # fmt: skip
        value_ND = tl.load(
            value_base + tl.cast(begin, tl.int64) * value_s + step_N[:, None] * value_s + dim_D[None, :],
            mask=mask_ND, other=0.0,
        )  # fmt: skip
        score_RN = tl.dot(query_RD, tl.trans(key_ND)) * scale_log2
        weight_RN = tl.exp2(score_RN - normalizer_R[:, None])
        if MOSTLY_FULL:
            if (begin < full_from) | (begin + N > full_to):
                visible_RN = _visible(key_N, exists_N, at_R, first_R, last_ptr, long_batch, S, BOUNDED)
                weight_RN = tl.where(visible_RN, weight_RN, 0.0)
        else:
            visible_RN = _visible(key_N, exists_N, at_R, first_R, last_ptr, long_batch, S, BOUNDED)
            weight_RN = tl.where(visible_RN, weight_RN, 0.0)
        weight_gradient_RN = tl.dot(gradient_RD, tl.trans(value_ND))
        score_gradient_RN = weight_RN * (weight_gradient_RN - delta_R[:, None])
        query_gradient_RD = tl.dot(score_gradient_RN.to(key_ND.dtype), key_ND, query_gradient_RD)
    tl.store(
        query_gradient_ptr + long_batch * dquery_b + long_t * dquery_t
        + (local_R * dquery_t + head_R * dquery_h)[:, None] + dim_D[None, :],
        (query_gradient_RD * scale).to(query_gradient_ptr.dtype.element_ty), mask=mask_RD,
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def key_value_gradient_kernel(
    query_ptr, key_ptr, value_ptr, gradient_ptr, key_gradient_ptr, value_gradient_ptr, normalizer_ptr,
    delta_ptr, first_ptr, last_ptr,
    query_b, query_t, query_h, key_b, key_s, key_h, value_b, value_s, value_h,
    gradient_b, gradient_t, gradient_h, dkey_b, dkey_s, dkey_h, dvalue_b, dvalue_s, dvalue_h,
    heads, kv_heads, group_size, T, S, window, scale, scale_log2,
    D: tl.constexpr, DIM: tl.constexpr, R: tl.constexpr, N: tl.constexpr, PACK: tl.constexpr,
    BOUNDED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys and values, over all query heads that read them."""
    tile, row = _tile_and_row(tl.cdiv(S, N))
    batch, kv_head = row // kv_heads, row % kv_heads
    long_batch = batch.to(tl.int64)
    start_s = tile * N
    step_N = tl.arange(0, N)
    key_N = start_s + step_N
    exists_N = key_N < S
    dim_D = tl.arange(0, DIM)
    real_D = dim_D < D
    mask_ND = exists_N[:, None] & real_D[None, :]
    key_ND = tl.load(
        key_ptr + long_batch * key_b + start_s.to(tl.int64) * key_s + kv_head * key_h
        + step_N[:, None] * key_s + dim_D[None, :],
        mask=mask_ND, other=0.0,
    )  # fmt: skip
    value_ND = tl.load(
        value_ptr + long_batch * value_b + start_s.to(tl.int64) * value_s + kv_head * value_h
        + step_N[:, None] * value_s + dim_D[None, :],
        mask=mask_ND, other=0.0,
    )  # fmt: skip
    if BOUNDED:
        last_N = tl.load(last_ptr + long_batch * S + key_N, mask=exists_N, other=-1)
    else:
        last_N = tl.where(exists_N, tl.minimum(key_N + (window - 1), S - 1), -1)
    offset = S - T
    # Queries stand at offset, offset + 1, ... among the keys.
    begin_t = tl.maximum(start_s - offset, 0)
    end_t = tl.max(last_N, 0) - offset + 1
    key_gradient_ND = tl.zeros([N, DIM], tl.float32)
    value_gradient_ND = tl.zeros([N, DIM], tl.float32)
    row_R = tl.arange(0, R)
    for pack in range(group_size // PACK):
        head_R = kv_head * group_size + pack * PACK + row_R % PACK
        for begin in tl.range(begin_t, end_t, R // PACK, num_stages=STAGES):
            local_R = row_R // PACK
            position_R = begin + local_R
            inside_R = position_R < end_t
            mask_RD = inside_R[:, None] & real_D[None, :]
            long_t = tl.cast(begin, tl.int64)
            query_RD = tl.load(
                query_ptr + long_batch * query_b + long_t * query_t
                + (local_R * query_t + head_R * query_h)[:, None] + dim_D[None, :],
                mask=mask_RD, other=0.0,
            )  # fmt: skip
            gradient_RD = tl.load(
                gradient_ptr + long_batch * gradient_b + long_t * gradient_t
                + (local_R * gradient_t + head_R * gradient_h)[:, None] + dim_D[None, :],
                mask=mask_RD, other=0.0,
            )  # fmt: skip
            row_offset_R = (long_batch * heads + head_R) * T + position_R
            normalizer_R = tl.load(normalizer_ptr + row_offset_R, mask=inside_R, other=float("inf"))
            delta_R = tl.load(delta_ptr + row_offset_R, mask=inside_R, other=0.0)
            at_R = position_R + offset
            score_NR = tl.dot(key_ND, tl.trans(query_RD)) * scale_log2
            weight_NR = tl.exp2(score_NR - normalizer_R[None, :])
            # Of key and query each may hide the other: padding inside a document is seen by none.
            visible_NR = (key_N[:, None] <= at_R[None, :]) & (at_R[None, :] <= last_N[:, None])
            if BOUNDED:
                first_R = tl.load(first_ptr + long_batch * T + position_R, mask=inside_R, other=S)
                visible_NR = visible_NR & (key_N[:, None] >= first_R[None, :])
            weight_NR = tl.where(visible_NR, weight_NR, 0.0)
            value_gradient_ND = tl.dot(weight_NR.to(gradient_RD.dtype), gradient_RD, value_gradient_ND)
            weight_gradient_NR = tl.dot(value_ND, tl.trans(gradient_RD))
            score_gradient_NR = weight_NR * (weight_gradient_NR - delta_R[None, :])
            key_gradient_ND = tl.dot(score_gradient_NR.to(query_RD.dtype), query_RD, key_gradient_ND)
    tl.store(
        key_gradient_ptr + long_batch * dkey_b + start_s.to(tl.int64) * dkey_s + kv_head * dkey_h
        + step_N[:, None] * dkey_s + dim_D[None, :],
        (key_gradient_ND * scale).to(key_gradient_ptr.dtype.element_ty), mask=mask_ND,
    )  # fmt: skip
    tl.store(
        value_gradient_ptr + long_batch * dvalue_b + start_s.to(tl.int64) * dvalue_s + kv_head * dvalue_h
        + step_N[:, None] * dvalue_s + dim_D[None, :],
        value_gradient_ND.to(value_gradient_ptr.dtype.element_ty), mask=mask_ND,
    )  # fmt: skip
