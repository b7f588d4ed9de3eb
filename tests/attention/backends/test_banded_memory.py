"""What `banded` allocates: nothing as large as the pairs of queries and keys, not even a mask."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from windowlm.attention.dispatch import attention
from windowlm.attention.window import Visibility

TOKENS = 2048
FULL = {"window": None}
BIDIRECTIONAL = {"window": None, "causal": False}


def documents() -> dict[str, Any]:
    return {"documents_BT": (torch.arange(TOKENS) // 900).int()[None]}


def ring() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "positions_BT": torch.arange(TOKENS)[None],
        "key_positions_BS": torch.randperm(TOKENS, generator=generator)[None],
    }


def largest_allocation(
    visibility: Visibility,
    keys: int,
    backend: str,
    options: dict[str, Any],
    *,
    queries: int = TOKENS,
    apart: bool = False,
) -> int:
    """Bytes that the largest operation of a forward and a backward pass took, and where numbers lie apart."""

    def heads(tokens: int, count: int) -> torch.Tensor:
        drawn = torch.randn(1, tokens, count, 8, 2 if apart else 1)
        return drawn[..., 0].requires_grad_()

    query, key, value = heads(queries, 2), heads(keys, 1), heads(keys, 1)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        output = attention(query, key, value, visibility, backend=backend, **options)
        if output.requires_grad:
            torch.autograd.grad(output.sum(), (query, key, value))
    return max(event.cpu_memory_usage for event in profiled.events())


@pytest.mark.parametrize(
    ("given", "made", "options"),
    [
        (FULL, dict, {}),
        (FULL, dict, {"dropout": 0.1}),
        (FULL, dict, {"logit_cap": 5.0}),
        (FULL, dict, {"sink_logits_H": torch.zeros(2)}),
        (FULL, documents, {"logit_cap": 5.0}),
        (FULL, ring, {}),
        (BIDIRECTIONAL, dict, {}),
        (BIDIRECTIONAL, dict, {"dropout": 0.1}),
        ({"window": 64}, ring, {}),
        ({"window": 64}, dict, {"logit_cap": 5.0}),
        ({"window": 64, "sinks": 4}, documents, {"sink_logits_H": torch.zeros(2)}),
        ({"window": 4, "sinks": 9, "causal": False}, dict, {}),
        ({"window": 1500}, dict, {}),
    ],
)
def test_nothing_grows_with_queries_times_keys(
    given: dict[str, Any], made: Callable[[], dict[str, Any]], options: dict[str, Any]
) -> None:
    visibility = Visibility.build(**given, **made())
    assert largest_allocation(visibility, TOKENS, "banded", options) < TOKENS * TOKENS


@pytest.mark.parametrize("differentiated", [True, False])
@pytest.mark.parametrize("given", [FULL, BIDIRECTIONAL, {"window": 1500}, {"window": 64}])
def test_nor_where_the_numbers_of_a_head_lie_apart(given: dict[str, Any], differentiated: bool) -> None:
    with torch.set_grad_enabled(differentiated):
        # A thread keeps memory of one size, whatever the length, from its first call on.
        largest_allocation(
            Visibility.build(**given), TOKENS // 4, "banded", {}, queries=TOKENS // 4, apart=True
        )
        taken = largest_allocation(Visibility.build(**given), TOKENS, "banded", {}, apart=True)
    assert taken < TOKENS * TOKENS


def test_nothing_grows_with_more_keys_than_queries() -> None:
    assert largest_allocation(Visibility.build(window=None), TOKENS + 100, "banded", {}) < TOKENS * TOKENS


def test_the_measure_sees_the_matrix_of_the_reference() -> None:
    taken = largest_allocation(Visibility.build(window=64), TOKENS, "reference", {})
    assert taken >= 4 * 2 * TOKENS * TOKENS
