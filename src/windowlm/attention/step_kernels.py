"""Triton kernels of attention with one query a row, over slots of which a mask says what is seen.

A program takes a run of the slots of one key-value head for all query heads that share it, so that keys and
values are read once. Where rows and heads are too few to fill a GPU, several programs share the slots, and
what each found is put together (Flash-Decoding, Dao et al. 2023,
https://crfm.stanford.edu/2023/10/12/flashdecoding.html). Softmax runs online in base 2.

Shapes: R query heads of a key-value head, padded, N slots of a tile, D head dimension, P parts of the slots.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["S", "slots_a_part"])
def step_kernel(
    query_ptr, key_ptr, value_ptr, seen_ptr, sink_ptr, output_ptr, mixed_ptr, largest_ptr, total_ptr,
    query_b, query_h, key_b, key_s, key_h, value_b, value_s, value_h, seen_b, output_b, output_h,
    kv_heads, S, slots_a_part, parts, scale, cap,
    G: tl.constexpr, R: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, N: tl.constexpr,
    SINKS: tl.constexpr, CAPPED: tl.constexpr, WHOLE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Output of a key-value head's queries; or, unless WHOLE, what the slots of one part come to.

    Where it may start before the kernel in front has ended, it waits for that one before it reads anything,
    and only then lets the next start, so that none runs beside the last but one.
    """
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row, part = tl.program_id(0), tl.program_id(1)
    batch, kv_head = (row // kv_heads).to(tl.int64), row % kv_heads
    head_R, dim_D = tl.arange(0, R), tl.arange(0, DIM)
    real_RD = (head_R[:, None] < G) & (dim_D[None, :] < D)
    at_RD = (kv_head * G + head_R)[:, None] * query_h + dim_D[None, :]
    query_RD = tl.load(query_ptr + batch * query_b + at_RD, mask=real_RD, other=0.0)
    mixed_RD = tl.zeros([R, DIM], tl.float32)
    largest_R = tl.full([R], float("-inf"), tl.float32)
    total_R = tl.zeros([R], tl.float32)
    begin = part * slots_a_part
    end = tl.minimum(begin + slots_a_part, S)
    place_N = tl.arange(0, N)
    seen = seen_ptr + batch * seen_b + place_N
    # Loads of single bytes are not among those that Triton starts early: the next tile's are asked for here.
    next_seen_N = tl.load(seen + begin, mask=begin + place_N < end, other=0)
    for start in tl.range(begin, end, N, num_stages=3):
        seen_N = next_seen_N != 0
        next_seen_N = tl.load(seen + start + N, mask=start + N + place_N < end, other=0)
        wanted_ND = (start + place_N < end)[:, None] & (dim_D[None, :] < D)
        # The slots of a long text are more numbers than 32 bits can count.
        keys = key_ptr + batch * key_b + kv_head * key_h + tl.cast(start, tl.int64) * key_s
        key_ND = tl.load(keys + place_N[:, None] * key_s + dim_D[None, :], mask=wanted_ND, other=0.0)
        values = value_ptr + batch * value_b + kv_head * value_h + tl.cast(start, tl.int64) * value_s
        value_ND = tl.load(values + place_N[:, None] * value_s + dim_D[None, :], mask=wanted_ND, other=0.0)
        score_RN = tl.dot(query_RD, tl.trans(key_ND), input_precision="ieee") * scale
        if CAPPED:
            # cap * tanh(score / cap)
            score_RN = cap * (2.0 * tl.sigmoid(2.0 * score_RN / cap) - 1.0)
        score_RN = tl.where(seen_N[None, :], score_RN * LOG2_E, float("-inf"))
        new_largest_R = tl.maximum(largest_R, tl.max(score_RN, 1))
        shift_R = tl.where(new_largest_R == float("-inf"), 0.0, new_largest_R)
        weight_RN = tl.exp2(score_RN - shift_R[:, None])
        shrink_R = tl.exp2(largest_R - shift_R)
        total_R = total_R * shrink_R + tl.sum(weight_RN, 1)
        # Zero times what was never written may be no number.
        value_ND = tl.where(seen_N[:, None], value_ND, 0.0)
        mixed_RD = mixed_RD * shrink_R[:, None]
        mixed_RD = tl.dot(weight_RN.to(value_ND.dtype), value_ND, mixed_RD, input_precision="ieee")
        largest_R = new_largest_R
    if WHOLE:
        if SINKS:
            sink_R = tl.load(sink_ptr + kv_head * G + head_R, mask=head_R < G, other=0.0).to(tl.float32)
            total_R += tl.exp2(sink_R * LOG2_E - largest_R)
        output_RD = (mixed_RD / total_R[:, None]).to(output_ptr.dtype.element_ty)
        at_RD = (kv_head * G + head_R)[:, None] * output_h + dim_D[None, :]
        tl.store(output_ptr + batch * output_b + at_RD, output_RD, mask=real_RD)
    else:
        at_R = (row.to(tl.int64) * G + head_R) * parts + part
        tl.store(largest_ptr + at_R, largest_R, mask=head_R < G)
        tl.store(total_ptr + at_R, total_R, mask=head_R < G)
        tl.store(mixed_ptr + at_R[:, None] * D + dim_D[None, :], mixed_RD, mask=real_RD)


@triton.jit(do_not_specialize=["parts"])
def join_kernel(
    mixed_ptr, largest_ptr, total_ptr, sink_ptr, output_ptr, output_b, output_h, heads, parts,
    D: tl.constexpr, DIM: tl.constexpr, P: tl.constexpr, SINKS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The output of one query head from what was found in the parts of the slots; it waits alike."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // heads, row % heads
    part_P, dim_D = tl.arange(0, P), tl.arange(0, DIM)
    exists_P = part_P < parts
    largest_P = tl.load(largest_ptr + row * parts + part_P, mask=exists_P, other=float("-inf"))
    total_P = tl.load(total_ptr + row * parts + part_P, mask=exists_P, other=0.0)
    largest = tl.max(largest_P, 0)
    # One slot is seen at least, in one part or another.
    share_P = tl.exp2(largest_P - largest)
    total = tl.sum(total_P * share_P, 0)
    if SINKS:
        total += tl.exp2(tl.load(sink_ptr + head).to(tl.float32) * LOG2_E - largest)
    found = mixed_ptr + (row * parts + part_P)[:, None] * D + dim_D[None, :]
    mixed_PD = tl.load(found, mask=exists_P[:, None] & (dim_D[None, :] < D), other=0.0)
    output_D = tl.sum(mixed_PD * share_P[:, None], 0) / total
    at = output_ptr + batch * output_b + head * output_h + dim_D
    tl.store(at, output_D.to(output_ptr.dtype.element_ty), mask=dim_D < D)
