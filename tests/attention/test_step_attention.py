"""One query a row over slots: products against the definition, kernels against the products."""

import itertools
import random

import pytest
import torch
from torch import Tensor

from windowlm.attention.step_attention import (
    attend_one,
    attend_one_by_kernels,
    attend_one_by_products,
    kernels_take,
)

SIZES = list(itertools.product([1, 3], [1, 2], [1, 3, 8], [8, 40, 64], [1, 63, 64, 65, 300]))


def drawn(batch: int, kv_heads: int, group: int, head_dim: int, slots: int, seed: int) -> tuple[Tensor, ...]:
    """Query, keys, values and what is seen: one slot at least; what is hidden is no number."""
    generator = torch.Generator().manual_seed(seed)
    query_B1HD = torch.randn(batch, 1, kv_heads * group, head_dim, generator=generator)
    key_BSKD, value_BSKD = torch.randn(2, batch, slots, kv_heads, head_dim, generator=generator)
    seen_BS = torch.rand(1 if seed % 2 else batch, slots, generator=generator) < (0.05, 0.5, 1.0)[seed % 3]
    seen_BS[:, seed % slots] = True
    return query_B1HD, key_BSKD, value_BSKD, seen_BS


def by_definition(
    query_B1HD: Tensor, key_BSKD: Tensor, value_BSKD: Tensor, seen_BS: Tensor, sink_logits_H: Tensor | None,
    logit_cap: float | None,
) -> Tensor:  # fmt: skip
    """Row by row and head by head."""
    output_B1HD = torch.empty_like(query_B1HD)
    group = query_B1HD.shape[2] // key_BSKD.shape[2]
    for row, head in itertools.product(range(len(query_B1HD)), range(query_B1HD.shape[2])):
        seen_S = seen_BS[row % len(seen_BS)]
        keys_SD, values_SD = (tensor[row, seen_S, head // group] for tensor in (key_BSKD, value_BSKD))
        score_S = keys_SD @ query_B1HD[row, 0, head] / keys_SD.shape[-1] ** 0.5
        if logit_cap is not None:
            score_S = logit_cap * torch.tanh(score_S / logit_cap)
        weight_S = score_S.exp()
        sink = 0.0 if sink_logits_H is None else sink_logits_H[head].exp()
        output_B1HD[row, 0, head] = weight_S @ values_SD / (weight_S.sum() + sink)
    return output_B1HD


@pytest.mark.parametrize("capped", [False, True])
def test_products_are_the_definition(capped: bool) -> None:
    for seed, sizes in enumerate(random.Random(0).sample(SIZES, 20)):
        query_B1HD, key_BSKD, value_BSKD, seen_BS = (
            tensor.double() if tensor.is_floating_point() else tensor for tensor in drawn(*sizes, seed)
        )
        sinks_H = torch.randn(query_B1HD.shape[2]).double() if seed % 2 else None
        options = (seen_BS, sinks_H, 3.0 if capped else None)
        wanted = by_definition(query_B1HD, key_BSKD, value_BSKD, *options)
        torch.testing.assert_close(attend_one(query_B1HD, key_BSKD, value_BSKD, *options), wanted)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("parts", [None, 1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_kernels_are_as_exact_as_products_in_their_dtype(dtype: torch.dtype, parts: int | None) -> None:
    sizes = [
        *random.Random(0).sample(SIZES, 40),
        (64, 4, 3, 64, 1024),
        (1, 4, 3, 128, 5000),
        (2, 2, 2, 256, 700),
    ]
    for seed, size in enumerate(sizes):
        query_B1HD, key_BSKD, value_BSKD, seen_BS = (
            tensor.cuda().to(dtype) if tensor.is_floating_point() else tensor.cuda()
            for tensor in drawn(*size, seed)
        )
        assert kernels_take(query_B1HD[:, 0])
        sinks_H = torch.randn(query_B1HD.shape[2], device="cuda").to(dtype) if seed % 2 else None
        cap = 3.0 if seed % 3 == 1 else None
        exact_B1HD = attend_one_by_products(
            query_B1HD.double(), key_BSKD.double(), value_BSKD.double(), seen_BS,
            None if sinks_H is None else sinks_H.double(), cap,
        )  # fmt: skip
        # What is hidden may be anything, as slots that were never written are.
        hidden_BS = ~seen_BS.expand(len(query_B1HD), -1)
        key_BSKD[hidden_BS], value_BSKD[hidden_BS] = torch.nan, torch.inf
        got_BHD = attend_one_by_kernels(query_B1HD[:, 0], key_BSKD, value_BSKD, seen_BS, sinks_H, cap, parts)
        # Rounded once at the end, and weights once before the product with values.
        allowed = 4 * torch.finfo(dtype).eps * float(value_BSKD[~hidden_BS].abs().max())
        torch.testing.assert_close(got_BHD.double(), exact_B1HD[:, 0], rtol=0, atol=allowed)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_slots_may_lie_further_apart_than_32_bits_count() -> None:
    slots, apart = 200, 2**24
    memory = torch.empty(slots * apart, dtype=torch.float16, device="cuda")
    key_BSKD, value_BSKD = (
        memory[start:].as_strided((1, slots, 1, 16), (slots * apart, apart, 16, 1)) for start in (0, 32)
    )
    query_B1HD = torch.randn(1, 1, 2, 16, dtype=torch.float16, device="cuda")
    key_BSKD.copy_(torch.randn(key_BSKD.shape))
    value_BSKD.copy_(torch.randn(value_BSKD.shape))
    seen_BS = torch.ones(1, slots, dtype=torch.bool, device="cuda")
    torch.testing.assert_close(
        attend_one_by_kernels(query_B1HD[:, 0], key_BSKD, value_BSKD, seen_BS),
        attend_one_by_products(query_B1HD, key_BSKD, value_BSKD, seen_BS)[:, 0],
        rtol=0,
        atol=4e-3,
    )
