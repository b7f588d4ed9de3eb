"""Attention with one query a row, over slots of which a mask says what is seen.

Shapes: B batch (a leading 1 stands for any), S slots, H query heads, K key-value heads, G query heads of a
key-value head, D head dimension, P parts of the slots.
"""

import torch
from torch import Tensor

from .backends import band
from .dispatch import compute_capability
from .operator import Operator

# What the kernels' products take.
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_HEAD_DIM = 256
# Three tiles of keys and three of values fit into the shared memory of any GPU that the kernels take.
MOST_SLOTS_OF_A_TILE, BYTES_OF_A_TILE = 64, 16384
# The products are small, and few warps wait for one another: on an H100 fewer or more take longer.
WARPS = 2
# From there on a kernel may start while the one before it ends (programmatic dependent launch).
EARLY_START_CAPABILITY = (9, 0)
# As many as the multiprocessors of a large GPU.
ENOUGH_PROGRAMS = 132


def attend_one(
    query_B1HD: Tensor,
    key_BSKD: Tensor,
    value_BSKD: Tensor,
    seen_BS: Tensor,
    sink_logits_H: Tensor | None = None,
    logit_cap: float | None = None,
) -> Tensor:
    """Softmax attention of one query a row over the slots that it sees, at least one; [B, 1, H, D].

    Scores and softmax are at least float32. By kernels of our own on a GPU of compute capability 8 and
    later, in their dtypes and up to their head dimension; by `attend_one_by_products` otherwise.
    """
    query_BHD = query_B1HD[:, 0]
    if not kernels_take(query_BHD):
        return attend_one_by_products(query_B1HD, key_BSKD, value_BSKD, seen_BS, sink_logits_H, logit_cap)
    output_BHD: Tensor = _attention.call(query_BHD, key_BSKD, value_BSKD, seen_BS, sink_logits_H, logit_cap)
    return output_BHD[:, None]


def kernels_take(query_BHD: Tensor) -> bool:
    """Whether kernels of our own serve such queries."""
    return (
        kernels_run_on(query_BHD.device)
        and query_BHD.dtype in KERNEL_DTYPES
        and query_BHD.shape[-1] <= LARGEST_HEAD_DIM
    )


def kernels_run_on(device: torch.device) -> bool:
    """Whether kernels in Triton do."""
    declared, capability = band.CAPABILITIES, compute_capability(device)
    return declared.missing is None and capability is not None and capability >= declared.compute_capability


def early_start(device: torch.device) -> dict[str, bool]:
    """Options of a kernel that may start early and waits by itself, and whether it may."""
    capability = compute_capability(device)
    early = capability is not None and capability >= EARLY_START_CAPABILITY
    return {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}


def attend_one_by_products(
    query_B1HD: Tensor,
    key_BSKD: Tensor,
    value_BSKD: Tensor,
    seen_BS: Tensor,
    sink_logits_H: Tensor | None = None,
    logit_cap: float | None = None,
) -> Tensor:
    """The same in matrix products."""
    kv_heads = key_BSKD.shape[2]
    wide = torch.promote_types(query_B1HD.dtype, torch.float32)
    batch, _, heads, head_dim = query_B1HD.shape
    query_BKGD = query_B1HD.to(wide).reshape(batch, kv_heads, -1, head_dim)
    query_BKGD = query_BKGD * head_dim**-0.5
    key_BKSD, value_BKSD = key_BSKD.transpose(1, 2).to(wide), value_BSKD.transpose(1, 2).to(wide)
    score_BKGS = query_BKGD @ key_BKSD.mT
    if logit_cap is not None:
        score_BKGS = logit_cap * torch.tanh(score_BKGS / logit_cap)
    score_BKGS = score_BKGS.masked_fill(~seen_BS[:, None, None], -torch.inf)
    if sink_logits_H is None:
        weight_BKGS = score_BKGS.softmax(-1)
    else:
        # One more key, of a score of its own and no value.
        sink_BKG1 = sink_logits_H.to(wide).view(1, kv_heads, -1, 1)
        sink_BKG1 = sink_BKG1.expand(len(score_BKGS), -1, -1, -1)
        weight_BKGS = torch.cat([score_BKGS, sink_BKG1], -1).softmax(-1)[..., :-1]
    output_B1HD: Tensor = (weight_BKGS @ value_BKSD).reshape(batch, 1, heads, head_dim)
    return output_B1HD.to(query_B1HD.dtype)


def attend_one_by_kernels(
    query_BHD: Tensor,
    key_BSKD: Tensor,
    value_BSKD: Tensor,
    seen_BS: Tensor,
    sink_logits_H: Tensor | None = None,
    logit_cap: float | None = None,
    parts: int | None = None,
) -> Tensor:
    """The same by kernels of our own; [B, H, D].

    Args:
        query_BHD, key_BSKD, value_BSKD, seen_BS, sink_logits_H, logit_cap: as of `attend_one`.
        parts: P; None for as many as fill the GPU.
    """
    from .step_kernels import join_kernel, step_kernel

    batch, heads, head_dim = query_BHD.shape
    slots, kv_heads = key_BSKD.shape[1:3]
    query_BHD, key_BSKD, value_BSKD = map(band.rows_contiguous, (query_BHD, key_BSKD, value_BSKD))
    seen_BS = seen_BS.contiguous()
    dim = band.power_of_two(head_dim)
    tile = min(MOST_SLOTS_OF_A_TILE, BYTES_OF_A_TILE // (dim * key_BSKD.element_size()))
    tiles = -(-slots // tile)
    if parts is None:
        parts = min(-(-ENOUGH_PROGRAMS // (batch * kv_heads)), tiles)
    tiles_a_part = -(-tiles // parts)
    parts = -(-tiles // tiles_a_part)
    output_BHD = torch.empty_like(query_BHD, memory_format=torch.contiguous_format)
    largest_BHP = query_BHD.new_empty((batch, heads, parts), dtype=torch.float32)
    total_BHP = torch.empty_like(largest_BHP)
    mixed_BHPD = query_BHD.new_empty((batch, heads, parts, head_dim), dtype=torch.float32)
    sinks = output_BHD if sink_logits_H is None else sink_logits_H.contiguous()  # or not read
    group, early = heads // kv_heads, early_start(query_BHD.device)
    step_kernel[batch * kv_heads, parts](
        query_BHD, key_BSKD, value_BSKD, seen_BS, sinks, output_BHD, mixed_BHPD, largest_BHP, total_BHP,
        *query_BHD.stride()[:2], *key_BSKD.stride()[:3], *value_BSKD.stride()[:3],
        seen_BS.stride(0) if len(seen_BS) > 1 else 0, *output_BHD.stride()[:2],
        kv_heads, slots, tiles_a_part * tile, parts, head_dim**-0.5, logit_cap or 0.0,
        G=group, R=band.power_of_two(group), D=head_dim, DIM=dim, N=tile,
        SINKS=sink_logits_H is not None, CAPPED=logit_cap is not None, WHOLE=parts == 1,
        num_warps=WARPS, **early,
    )  # fmt: skip
    if parts > 1:
        join_kernel[(batch * heads,)](
            mixed_BHPD, largest_BHP, total_BHP, sinks, output_BHD, *output_BHD.stride()[:2], heads, parts,
            D=head_dim, DIM=dim, P=1 << (parts - 1).bit_length(), SINKS=sink_logits_H is not None, **early,
        )  # fmt: skip
    return output_BHD


_attention = Operator(
    f"{__name__}.attend_one",
    "(Tensor query, Tensor key, Tensor value, Tensor seen, Tensor? sink_logits, float? logit_cap) -> Tensor",
    attend_one_by_kernels,
    lambda query_BHD, *_: torch.empty_like(query_BHD, memory_format=torch.contiguous_format),
)
