"""Triton kernels of windowed attention, with tiles that start where the window starts.

A tile of queries holds `PACK` query heads of one key-value head beside each other in its rows, so that a
key read once serves all of them and the tile spans few positions: with W = 128 and eight heads, 128 rows are
16 positions that together see 143 keys, where a tile of 128 positions of one head sees 255.

Softmax runs online in base 2 (Milakov and Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022,
arXiv:2205.14135). The backward recomputes the weights, once by tiles of queries for the gradient of the
query and once by tiles of keys for those of key and value, so that nothing is added atomically and results
do not depend on the order of execution.

Each kernel has a loop over the tiles at the window's two edges, which masks, and, where the window is wide,
one over those between, of which every query sees every key.

What the kernels keep of each query, a number of float32, lies in the order of a tile's rows: for each batch
and pack of heads the heads of the first position, those of the second, and so on.

Shapes: R rows of a tile (positions x packed heads), N keys of a tile, D head dimension.
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
def _row_pointers(pointer, batch, start_t, stride_b, stride_t, stride_h, local_R, head_R, DIM: tl.constexpr):
    """Where the rows of a tile of queries lie, [R, DIM]."""
    base = pointer + batch.to(tl.int64) * stride_b + tl.cast(start_t, tl.int64) * stride_t
    return base + (local_R * stride_t + head_R * stride_h)[:, None] + tl.arange(0, DIM)[None, :]


@triton.jit
def _vector_offsets(row, start_t, vector_stride, R: tl.constexpr, PACK: tl.constexpr):
    """Where the numbers of a tile's rows lie, [R]; `row` counts the packs of all batches."""
    return tl.cast(row, tl.int64) * vector_stride + start_t * PACK + tl.arange(0, R)


@triton.jit
def _key_pointers(
    pointer, batch, begin, kv_head, stride_b, stride_s, stride_h, N: tl.constexpr, DIM: tl.constexpr
):
    """Where N keys or values from `begin` on lie, [N, DIM]."""
    base = pointer + batch.to(tl.int64) * stride_b + kv_head * stride_h + tl.cast(begin, tl.int64) * stride_s
    return base + tl.arange(0, N)[:, None] * stride_s + tl.arange(0, DIM)[None, :]


@triton.jit
def _load(pointers, valid, D: tl.constexpr, DIM: tl.constexpr, MASKED: tl.constexpr):
    """The numbers there, zeros for rows that are not valid and beyond the head dimension."""
    real_D = tl.arange(0, DIM) < D
    if MASKED:
        numbers = tl.load(pointers, mask=valid[:, None] & real_D[None, :], other=0.0)
    elif D == DIM:
        numbers = tl.load(pointers)
    else:
        numbers = tl.load(pointers, mask=real_D[None, :], other=0.0)
    return numbers


@triton.jit
def _first_keys(first_ptr, batch, position_R, inside_R, at_R, T, S, window, BOUNDED: tl.constexpr):
    """First key that each row sees; beyond all keys where it sees none."""
    if BOUNDED:
        first_R = tl.load(first_ptr + batch.to(tl.int64) * T + position_R, mask=inside_R, other=S)
    else:
        first_R = tl.where(inside_R, tl.maximum(at_R - window + 1, 0), S)
    return first_R


@triton.jit
def _steps(start, stop, full_from, full_to, STEP: tl.constexpr):
    """Steps from start to stop before those within full_from and full_to, those, and all others."""
    count = tl.cdiv(tl.maximum(stop - start, 0), STEP)
    before = tl.minimum(tl.cdiv(tl.maximum(full_from - start, 0), STEP), count)
    full = tl.maximum(tl.minimum(full_to, stop) - (start + before * STEP), 0) // STEP
    return before, full, count - full


@triton.jit
def _key_steps(first_R, inside_R, first_at, stop, gaps_ptr, N: tl.constexpr, BOUNDED: tl.constexpr):
    """The key at which a tile of queries starts, and its steps over keys.

    Every row sees what lies from the greatest first key of a row up to the first row's place, but not
    where padding stands inside documents.
    """
    start = tl.min(first_R, 0)
    full_from = tl.max(tl.where(inside_R, first_R, 0), 0)
    full_to = first_at + 1
    if BOUNDED:
        full_to = tl.where(tl.load(gaps_ptr) == 0, full_to, -1)
    before, full, others = _steps(start, stop, full_from, full_to, N)
    return start, before, full, others


@triton.jit
def _begin(start, step, before, full, STEP: tl.constexpr, MASKED: tl.constexpr):
    """Where a step begins: of those to mask, the ones behind `before` come after the full ones."""
    if MASKED:
        step += tl.where(step >= before, full, 0)
    else:
        step += before
    return start + step * STEP


@triton.jit
def _visible(key_N, exists_N, at_R, first_R, last_ptr, batch, S, BOUNDED: tl.constexpr):
    """Whether each row sees each key."""
    visible_RN = (key_N[None, :] <= at_R[:, None]) & (key_N[None, :] >= first_R[:, None])
    if BOUNDED:
        last_N = tl.load(last_ptr + batch.to(tl.int64) * S + key_N, mask=exists_N, other=-1)
        visible_RN = visible_RN & (at_R[:, None] <= last_N[None, :])
    return visible_RN


@triton.jit
def _forward_steps(
    mixed_RD, total_R, largest_R, query_RD, key_ptr, value_ptr, last_ptr, at_R, first_R,
    key_b, key_s, key_h, value_b, value_s, value_h, batch, kv_head, S, scale_log2,
    count, start, stop, before, full,
    D: tl.constexpr, DIM: tl.constexpr, N: tl.constexpr, BOUNDED: tl.constexpr, MASKED: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    for step in tl.range(0, count, num_stages=STAGES):
        begin = _begin(start, step, before, full, N, MASKED)
        key_N = begin + tl.arange(0, N)
        exists_N = key_N < stop
        keys = _key_pointers(key_ptr, batch, begin, kv_head, key_b, key_s, key_h, N, DIM)
        score_RN = tl.dot(query_RD, tl.trans(_load(keys, exists_N, D, DIM, MASKED)))
        if MASKED:
            visible_RN = _visible(key_N, exists_N, at_R, first_R, last_ptr, batch, S, BOUNDED)
            score_RN = tl.where(visible_RN, score_RN, float("-inf"))
        new_largest_R = tl.maximum(largest_R, tl.max(score_RN, 1) * scale_log2)
        shift_R = new_largest_R
        if MASKED:
            # A row that has seen nothing yet has no largest score to subtract.
            shift_R = tl.where(new_largest_R == float("-inf"), 0.0, new_largest_R)
        weight_RN = tl.exp2(score_RN * scale_log2 - shift_R[:, None])
        shrink_R = tl.exp2(largest_R - shift_R)
        total_R = total_R * shrink_R + tl.sum(weight_RN, 1)
        values = _key_pointers(value_ptr, batch, begin, kv_head, value_b, value_s, value_h, N, DIM)
        value_ND = _load(values, exists_N, D, DIM, MASKED)
        mixed_RD = tl.dot(weight_RN.to(value_ND.dtype), value_ND, mixed_RD * shrink_R[:, None])
        largest_R = new_largest_R
    return mixed_RD, total_R, largest_R


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    query_ptr, key_ptr, value_ptr, output_ptr, normalizer_ptr, first_ptr, last_ptr, gaps_ptr,
    query_b, query_t, query_h, key_b, key_s, key_h, value_b, value_s, value_h, output_b, output_t, output_h,
    vector_stride, heads, group_size, T, S, window, scale_log2,
    D: tl.constexpr, DIM: tl.constexpr, R: tl.constexpr, N: tl.constexpr, PACK: tl.constexpr,
    BOUNDED: tl.constexpr, MOSTLY_FULL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Outputs and log2 of the softmax's denominators of one tile of queries."""
    tile, row = _tile_and_row(tl.cdiv(T, R // PACK))
    groups = heads // PACK
    batch, group = row // groups, row % groups
    kv_head = group * PACK // group_size
    local_R, head_R = tl.arange(0, R) // PACK, group * PACK + tl.arange(0, R) % PACK
    start_t = tile * (R // PACK)
    position_R = start_t + local_R
    inside_R = position_R < T
    at_R = position_R + (S - T)
    queries = _row_pointers(query_ptr, batch, start_t, query_b, query_t, query_h, local_R, head_R, DIM)
    query_RD = _load(queries, inside_R, D, DIM, True)
    first_R = _first_keys(first_ptr, batch, position_R, inside_R, at_R, T, S, window, BOUNDED)
    stop = tl.minimum(start_t + R // PACK + (S - T), S)
    start, before, full, others = _key_steps(first_R, inside_R, start_t + (S - T), stop, gaps_ptr, N, BOUNDED)
    if not MOSTLY_FULL:
        full, others = 0, others + full
    mixed_RD = tl.zeros([R, DIM], tl.float32)
    total_R = tl.zeros([R], tl.float32)
    largest_R = tl.full([R], float("-inf"), tl.float32)
    mixed_RD, total_R, largest_R = _forward_steps(
        mixed_RD, total_R, largest_R, query_RD, key_ptr, value_ptr, last_ptr, at_R, first_R,
        key_b, key_s, key_h, value_b, value_s, value_h, batch, kv_head, S, scale_log2,
        others, start, stop, before, full, D, DIM, N, BOUNDED, True, STAGES,
    )  # fmt: skip
    if MOSTLY_FULL:
        mixed_RD, total_R, largest_R = _forward_steps(
            mixed_RD, total_R, largest_R, query_RD, key_ptr, value_ptr, last_ptr, at_R, first_R,
            key_b, key_s, key_h, value_b, value_s, value_h, batch, kv_head, S, scale_log2,
            full, start, stop, before, full, D, DIM, N, BOUNDED, False, STAGES,
        )  # fmt: skip
    seen_R = total_R > 0
    mixed_RD = mixed_RD / tl.where(seen_R, total_R, 1.0)[:, None]
    tl.store(
        _row_pointers(output_ptr, batch, start_t, output_b, output_t, output_h, local_R, head_R, DIM),
        mixed_RD.to(output_ptr.dtype.element_ty),
        mask=inside_R[:, None] & (tl.arange(0, DIM) < D)[None, :],
    )
    # Infinite where nothing is seen, which makes every weight of the row zero in the backward.
    normalizer_R = tl.where(seen_R, largest_R + tl.log2(tl.where(seen_R, total_R, 1.0)), float("inf"))
    tl.store(
        normalizer_ptr + _vector_offsets(row, start_t, vector_stride, R, PACK), normalizer_R, mask=inside_R
    )


@triton.jit
def _query_gradient_steps(
    query_gradient_RD, query_RD, gradient_RD, normalizer_R, delta_R, key_ptr, value_ptr,
    last_ptr, at_R, first_R,
    key_b, key_s, key_h, value_b, value_s, value_h, batch, kv_head, S, scale_log2,
    count, start, stop, before, full,
    D: tl.constexpr, DIM: tl.constexpr, N: tl.constexpr, BOUNDED: tl.constexpr, MASKED: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    for step in tl.range(0, count, num_stages=STAGES):
        begin = _begin(start, step, before, full, N, MASKED)
        key_N = begin + tl.arange(0, N)
        exists_N = key_N < stop
        keys = _key_pointers(key_ptr, batch, begin, kv_head, key_b, key_s, key_h, N, DIM)
        key_ND = _load(keys, exists_N, D, DIM, MASKED)
        values = _key_pointers(value_ptr, batch, begin, kv_head, value_b, value_s, value_h, N, DIM)
        value_ND = _load(values, exists_N, D, DIM, MASKED)
        score_RN = tl.dot(query_RD, tl.trans(key_ND))
        weight_RN = tl.exp2(score_RN * scale_log2 - normalizer_R[:, None])
        if MASKED:
            visible_RN = _visible(key_N, exists_N, at_R, first_R, last_ptr, batch, S, BOUNDED)
            weight_RN = tl.where(visible_RN, weight_RN, 0.0)
        weight_gradient_RN = tl.dot(gradient_RD, tl.trans(value_ND))
        score_gradient_RN = weight_RN * (weight_gradient_RN - delta_R[:, None])
        if MASKED:
            # Zero times what overflows with a hidden value is no number.
            score_gradient_RN = tl.where(weight_RN > 0.0, score_gradient_RN, 0.0)
        query_gradient_RD = tl.dot(score_gradient_RN.to(key_ND.dtype), key_ND, query_gradient_RD)
    return query_gradient_RD


@triton.jit(do_not_specialize=SIZES)
def query_gradient_kernel(
    query_ptr, key_ptr, value_ptr, output_ptr, gradient_ptr, query_gradient_ptr, normalizer_ptr, delta_ptr,
    first_ptr, last_ptr, gaps_ptr,
    query_b, query_t, query_h, key_b, key_s, key_h, value_b, value_s, value_h, output_b, output_t, output_h,
    gradient_b, gradient_t, gradient_h, dquery_b, dquery_t, dquery_h,
    vector_stride, heads, group_size, T, S, window, scale, scale_log2,
    D: tl.constexpr, DIM: tl.constexpr, R: tl.constexpr, N: tl.constexpr, PACK: tl.constexpr,
    BOUNDED: tl.constexpr, MOSTLY_FULL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of queries; leaves each row's output times gradient for the other kernel."""
    tile, row = _tile_and_row(tl.cdiv(T, R // PACK))
    groups = heads // PACK
    batch, group = row // groups, row % groups
    kv_head = group * PACK // group_size
    local_R, head_R = tl.arange(0, R) // PACK, group * PACK + tl.arange(0, R) % PACK
    start_t = tile * (R // PACK)
    position_R = start_t + local_R
    inside_R = position_R < T
    at_R = position_R + (S - T)
    queries = _row_pointers(query_ptr, batch, start_t, query_b, query_t, query_h, local_R, head_R, DIM)
    query_RD = _load(queries, inside_R, D, DIM, True)
    gradients = _row_pointers(
        gradient_ptr, batch, start_t, gradient_b, gradient_t, gradient_h, local_R, head_R, DIM
    )
    gradient_RD = _load(gradients, inside_R, D, DIM, True)
    outputs = _row_pointers(output_ptr, batch, start_t, output_b, output_t, output_h, local_R, head_R, DIM)
    output_RD = _load(outputs, inside_R, D, DIM, True)
    delta_R = tl.sum(output_RD.to(tl.float32) * gradient_RD.to(tl.float32), 1)
    offset_R = _vector_offsets(row, start_t, vector_stride, R, PACK)
    tl.store(delta_ptr + offset_R, delta_R, mask=inside_R)
    normalizer_R = tl.load(normalizer_ptr + offset_R, mask=inside_R, other=float("inf"))
    first_R = _first_keys(first_ptr, batch, position_R, inside_R, at_R, T, S, window, BOUNDED)
    stop = tl.minimum(start_t + R // PACK + (S - T), S)
    start, before, full, others = _key_steps(first_R, inside_R, start_t + (S - T), stop, gaps_ptr, N, BOUNDED)
    if not MOSTLY_FULL:
        full, others = 0, others + full
    query_gradient_RD = _query_gradient_steps(
        tl.zeros([R, DIM], tl.float32), query_RD, gradient_RD, normalizer_R, delta_R, key_ptr, value_ptr,
        last_ptr, at_R, first_R,
        key_b, key_s, key_h, value_b, value_s, value_h, batch, kv_head, S, scale_log2,
        others, start, stop, before, full, D, DIM, N, BOUNDED, True, STAGES,
    )  # fmt: skip
    if MOSTLY_FULL:
        query_gradient_RD = _query_gradient_steps(
            query_gradient_RD, query_RD, gradient_RD, normalizer_R, delta_R, key_ptr, value_ptr,
            last_ptr, at_R, first_R,
            key_b, key_s, key_h, value_b, value_s, value_h, batch, kv_head, S, scale_log2,
            full, start, stop, before, full, D, DIM, N, BOUNDED, False, STAGES,
        )  # fmt: skip
    tl.store(
        _row_pointers(query_gradient_ptr, batch, start_t, dquery_b, dquery_t, dquery_h, local_R, head_R, DIM),
        (query_gradient_RD * scale).to(query_gradient_ptr.dtype.element_ty),
        mask=inside_R[:, None] & (tl.arange(0, DIM) < D)[None, :],
    )


@triton.jit
def _key_value_gradient_steps(
    key_gradient_ND, value_gradient_ND, key_ND, value_ND, query_ptr, gradient_ptr, normalizer_ptr,
    delta_ptr, first_ptr, key_N, last_N, head, row,
    query_b, query_t, query_h, gradient_b, gradient_t, gradient_h, vector_stride, batch, T, S, scale_log2,
    count, start, stop, before, full,
    D: tl.constexpr, DIM: tl.constexpr, R: tl.constexpr, PACK: tl.constexpr, BOUNDED: tl.constexpr,
    MASKED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    local_R, head_R = tl.arange(0, R) // PACK, head + tl.arange(0, R) % PACK
    for step in tl.range(0, count, num_stages=STAGES):
        begin = _begin(start, step, before, full, R // PACK, MASKED)
        position_R = begin + local_R
        inside_R = position_R < stop
        queries = _row_pointers(query_ptr, batch, begin, query_b, query_t, query_h, local_R, head_R, DIM)
        query_RD = _load(queries, inside_R, D, DIM, MASKED)
        gradients = _row_pointers(
            gradient_ptr, batch, begin, gradient_b, gradient_t, gradient_h, local_R, head_R, DIM
        )
        gradient_RD = _load(gradients, inside_R, D, DIM, MASKED)
        offset_R = _vector_offsets(row, begin, vector_stride, R, PACK)
        if MASKED:
            normalizer_R = tl.load(normalizer_ptr + offset_R, mask=inside_R, other=float("inf"))
            delta_R = tl.load(delta_ptr + offset_R, mask=inside_R, other=0.0)
        else:
            normalizer_R = tl.load(normalizer_ptr + offset_R)
            delta_R = tl.load(delta_ptr + offset_R)
        score_NR = tl.dot(key_ND, tl.trans(query_RD))
        weight_NR = tl.exp2(score_NR * scale_log2 - normalizer_R[None, :])
        if MASKED:
            # Of key and query each may hide the other: padding inside a document is seen by none.
            at_R = position_R + (S - T)
            visible_NR = (key_N[:, None] <= at_R[None, :]) & (at_R[None, :] <= last_N[:, None])
            if BOUNDED:
                first_R = tl.load(first_ptr + batch.to(tl.int64) * T + position_R, mask=inside_R, other=S)
                visible_NR = visible_NR & (key_N[:, None] >= first_R[None, :])
            weight_NR = tl.where(visible_NR, weight_NR, 0.0)
        value_gradient_ND = tl.dot(weight_NR.to(gradient_RD.dtype), gradient_RD, value_gradient_ND)
        weight_gradient_NR = tl.dot(value_ND, tl.trans(gradient_RD))
        score_gradient_NR = weight_NR * (weight_gradient_NR - delta_R[None, :])
        if MASKED:
            # As in the other kernel.
            score_gradient_NR = tl.where(weight_NR > 0.0, score_gradient_NR, 0.0)
        key_gradient_ND = tl.dot(score_gradient_NR.to(query_RD.dtype), query_RD, key_gradient_ND)
    return key_gradient_ND, value_gradient_ND


@triton.jit(do_not_specialize=SIZES)
def key_value_gradient_kernel(
    query_ptr, key_ptr, value_ptr, gradient_ptr, key_gradient_ptr, value_gradient_ptr, normalizer_ptr,
    delta_ptr, first_ptr, last_ptr, gaps_ptr,
    query_b, query_t, query_h, key_b, key_s, key_h, value_b, value_s, value_h,
    gradient_b, gradient_t, gradient_h, dkey_b, dkey_s, dkey_h, dvalue_b, dvalue_s, dvalue_h,
    vector_stride, kv_heads, group_size, T, S, window, scale, scale_log2,
    D: tl.constexpr, DIM: tl.constexpr, R: tl.constexpr, N: tl.constexpr, PACK: tl.constexpr,
    BOUNDED: tl.constexpr, MOSTLY_FULL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys and values, over all query heads that read them."""
    tile, row = _tile_and_row(tl.cdiv(S, N))
    batch, kv_head = row // kv_heads, row % kv_heads
    start_s = tile * N
    key_N = start_s + tl.arange(0, N)
    exists_N = key_N < S
    keys = _key_pointers(key_ptr, batch, start_s, kv_head, key_b, key_s, key_h, N, DIM)
    key_ND = _load(keys, exists_N, D, DIM, True)
    values = _key_pointers(value_ptr, batch, start_s, kv_head, value_b, value_s, value_h, N, DIM)
    value_ND = _load(values, exists_N, D, DIM, True)
    if BOUNDED:
        last_N = tl.load(last_ptr + batch.to(tl.int64) * S + key_N, mask=exists_N, other=-1)
    else:
        last_N = tl.where(exists_N, tl.minimum(key_N + (window - 1), S - 1), -1)
    # Queries stand at offset, offset + 1, ... among the keys.
    offset = S - T
    # From a multiple on, so that several numbers of queries that follow one another are read at once.
    start = tl.maximum(start_s - offset, 0) // 4 * 4
    stop = tl.max(last_N, 0) - offset + 1
    full_from, full_to = start_s + N - 1 - offset, tl.min(last_N, 0) - offset + 1
    if BOUNDED:
        full_to = tl.where(tl.load(gaps_ptr) == 0, full_to, -1)
    before, full, others = _steps(start, stop, full_from, full_to, R // PACK)
    if not MOSTLY_FULL:
        full, others = 0, others + full
    key_gradient_ND = tl.zeros([N, DIM], tl.float32)
    value_gradient_ND = tl.zeros([N, DIM], tl.float32)
    for pack in range(group_size // PACK):
        head = kv_head * group_size + pack * PACK
        pack_row = row * (group_size // PACK) + pack
        key_gradient_ND, value_gradient_ND = _key_value_gradient_steps(
            key_gradient_ND, value_gradient_ND, key_ND, value_ND, query_ptr, gradient_ptr, normalizer_ptr,
            delta_ptr, first_ptr, key_N, last_N, head, pack_row,
            query_b, query_t, query_h, gradient_b, gradient_t, gradient_h, vector_stride, batch, T, S,
            scale_log2,
            others, start, stop, before, full, D, DIM, R, PACK, BOUNDED, True, STAGES,
        )  # fmt: skip
        if MOSTLY_FULL:
            key_gradient_ND, value_gradient_ND = _key_value_gradient_steps(
                key_gradient_ND, value_gradient_ND, key_ND, value_ND, query_ptr, gradient_ptr, normalizer_ptr,
                delta_ptr, first_ptr, key_N, last_N, head, pack_row,
                query_b, query_t, query_h, gradient_b, gradient_t, gradient_h, vector_stride, batch, T, S,
                scale_log2,
                full, start, stop, before, full, D, DIM, R, PACK, BOUNDED, False, STAGES,
            )  # fmt: skip
    mask_ND = exists_N[:, None] & (tl.arange(0, DIM) < D)[None, :]
    tl.store(
        _key_pointers(key_gradient_ptr, batch, start_s, kv_head, dkey_b, dkey_s, dkey_h, N, DIM),
        (key_gradient_ND * scale).to(key_gradient_ptr.dtype.element_ty),
        mask=mask_ND,
    )
    tl.store(
        _key_pointers(value_gradient_ptr, batch, start_s, kv_head, dvalue_b, dvalue_s, dvalue_h, N, DIM),
        value_gradient_ND.to(value_gradient_ptr.dtype.element_ty),
        mask=mask_ND,
    )
