"""Wide windows and full attention on a CPU: torch's kernel forward; backward our tiles or that kernel."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from windowlm.attention.backends import banded, banded_tiles, banded_wide
from windowlm.attention.backends.banded_workspace import BYTES, Workspace
from windowlm.attention.dispatch import attention
from windowlm.attention.window import Visibility

HUGE = 3e38


@pytest.fixture(autouse=True)
def small_blocks_and_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut short sequences as long ones are."""
    for module, name, value in (
        (banded, "WIDE", 1),
        (banded_wide, "BLOCK", 32),
        (banded_wide, "LONG", 64),
        (banded_wide, "SHORT", 16),
        (banded_wide, "SHORT_BACKWARD", 120),
        (banded_wide, "QUERIES_AT_A_TIME", 8),
        (banded_tiles, "ROWS", 32),
        (banded_tiles, "KEYS", 96),
        (banded_tiles, "ONE_TILE", 100),
    ):
        monkeypatch.setattr(module, name, value)


def heads(tokens: int, count: int = 2, dim: int = 8, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(tokens + count)
    return torch.randn(2, tokens, count, dim, dtype=dtype, generator=generator).requires_grad_()


def results(tokens: int, query_heads: int, window: int | None, backend: str) -> tuple[Tensor, ...]:
    tensors = heads(tokens, query_heads), heads(tokens), heads(tokens)
    output = attention(*tensors, Visibility.build(window=window), backend=backend)
    return output, *torch.autograd.grad(output, tensors, heads(tokens, query_heads, dim=8).detach().cos())


@pytest.mark.parametrize("query_heads", [2, 6])
@pytest.mark.parametrize("tokens", [1, 15, 17, 63, 100, 131, 333])
@pytest.mark.parametrize("window", [1, 16, 31, 64, 99, 100, 101, 300, None])
def test_blocks_and_tiles_equal_the_reference(tokens: int, window: int | None, query_heads: int) -> None:
    ours, exact = (results(tokens, query_heads, window, backend) for backend in ("banded", "reference"))
    for tensor, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(tensor, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize("window", [50, 200, None])
def test_threads_share_the_keys_and_sum_in_the_same_order_each_time(
    threads: int, kv_heads: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(banded_tiles, "SHARED", 0)
    tensors = [heads(400, count, dtype=torch.float32) for count in (2 * kv_heads, kv_heads, kv_heads)]
    tensors = [tensor[:1].detach().requires_grad_() for tensor in tensors]
    gradient = torch.randn(tensors[0].shape)

    def computed(threads: int) -> tuple[Tensor, ...]:
        torch.set_num_threads(threads)
        try:
            mixed = attention(*tensors, Visibility.build(window=window), backend="banded")
            return mixed, *torch.autograd.grad(mixed, tensors, gradient)
        finally:
            torch.set_num_threads(1)

    shared = computed(threads)
    for ours, again, alone in zip(shared, computed(threads), computed(1), strict=True):
        assert torch.equal(ours, again)
        torch.testing.assert_close(ours, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [1, 100, 400])
@pytest.mark.parametrize("parts", [1, 2, 5, 40])
def test_parts_hold_each_key_once(window: int, parts: int) -> None:
    tiles = banded_tiles._Tiles.fit(torch.empty(1, 500, 2, 8), torch.empty(1, 500, 2, 8), window, False)
    keys = [
        key
        for part in range(parts)
        for start, stop in tiles.of_keys(*tiles.part(part, parts))
        for key in range(start, stop)
    ]
    assert keys == list(range(500))


def test_work_that_is_too_little_to_share_is_not() -> None:
    few, many = (torch.empty(1, tokens, 1, dim) for tokens, dim in ((300, 8), (8000, 64)))
    torch.set_num_threads(2)
    try:
        for tensor, shares in ((few, 1), (many, 2)):
            tiles = banded_tiles._Tiles.fit(tensor, tensor, tensor.shape[1], False)
            assert len(tiles.shares(tensor, tensor)) == shares
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("window", [40, 200, None])
@pytest.mark.parametrize("huge", [[140], [100, 141], [0, 35, 36, 150, 299]])
def test_hidden_keys_and_values_of_any_size_change_nothing(window: int | None, huge: list[int]) -> None:
    visibility = Visibility.build(window=window)
    query, gradient = (heads(300, 4, dtype=torch.float32).detach() for _ in range(2))
    key, value = (heads(300, 2, dtype=torch.float32).detach() for _ in range(2))
    query.requires_grad_()
    blind_T = ~visibility.mask(300, 300, query.device)[0, :, huge].any(1)

    def output_and_gradient(key: Tensor, value: Tensor) -> list[Tensor]:
        mixed = attention(query, key, value, visibility, backend="banded")
        (of_query,) = torch.autograd.grad(mixed, query, gradient)
        return [mixed[:, blind_T], of_query[:, blind_T]]

    before = output_and_gradient(key, value)
    for changed_is_key in (True, False):
        changed = [key.clone(), value.clone()]
        changed[not changed_is_key][:, huge] = HUGE
        for ours, expected in zip(output_and_gradient(*changed), before, strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("huge", [[70], [20, 71], [0, 40, 99]])
def test_hidden_keys_and_values_of_any_size_change_no_gradient_of_the_kernel(
    window: int | None, huge: list[int]
) -> None:
    visibility = Visibility.build(window=window)
    query, key, value = (heads(100, count, dtype=torch.float32).detach() for count in (4, 2, 2))
    query.requires_grad_()
    blind_T = ~visibility.mask(100, 100, query.device)[0, :, huge].any(1)

    def gradient(key: Tensor, value: Tensor) -> Tensor:
        mixed = attention(query, key, value, visibility, backend="banded")
        return torch.autograd.grad(mixed, query, query.detach().cos())[0][:, blind_T]

    before = gradient(key, value)
    for number in range(2):
        changed = [key.clone(), value.clone()]
        changed[number][:, huge] = HUGE
        torch.testing.assert_close(gradient(*changed), before)


def test_the_kernel_has_short_sequences_of_heads_that_threads_share_evenly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    computed, fill = [], banded_wide._fill_by_kernel

    def recorded(*inputs: Any) -> None:
        computed.append(tuple(inputs[2].shape[1:3]))
        fill(*inputs)

    monkeypatch.setattr(banded_wide, "_fill_by_kernel", recorded)
    torch.set_num_threads(2)
    try:
        for tokens, count, window in ((100, 2, 100), (100, 2, 31), (100, 3, 100), (16, 3, 16), (121, 2, 121)):
            query = heads(tokens, count)
            visibility = Visibility.build(window=window)
            attention(query[:1], query[:1], query[:1], visibility, backend="banded").sum().backward()
    finally:
        torch.set_num_threads(1)
    assert computed == [(100, 1), (100, 1), (16, 3)]


def test_a_query_that_sees_a_large_key_is_as_if_nothing_were_hidden() -> None:
    query, value = (heads(200, 1, dtype=torch.float32).detach() for _ in range(2))
    key = heads(200, 1, dtype=torch.float32).detach()
    query[:, 150:] *= 1e-30
    key[:, 150] = 1e37
    for window in (40, 100):
        ours, exact = (
            attention(query, key, value, Visibility.build(window=window), backend=backend)
            for backend in ("banded", "reference")
        )
        torch.testing.assert_close(ours, exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 60])
def test_gradients_of_one_tile_are_as_exact_as_the_formula_where_weights_are_near_one(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(banded_wide, "SHORT_BACKWARD", 0)
    visibility = Visibility.build(window=window)
    query, key, value = (heads(100, count).detach() for count in (2, 2, 2))
    query *= 100.0

    def gradients(backend: str, dtype: torch.dtype) -> list[Tensor]:
        tensors = [tensor.to(dtype).requires_grad_() for tensor in (query, key, value)]
        mixed = attention(*tensors, visibility, backend=backend)
        return [each.double() for each in torch.autograd.grad(mixed.sin().sum(), tensors)]

    exact = gradients("reference", torch.float64)
    for ours, plain, expected in zip(
        gradients("banded", torch.float32), gradients("reference", torch.float32), exact, strict=True
    ):
        assert (ours - expected).norm() <= 2 * (plain - expected).norm()


def test_the_mask_is_not_as_large_as_the_pairs_and_made_once() -> None:
    visibility = Visibility.build(window=300)
    query = heads(700, 1)
    for _ in range(2):
        attention(query, query, query, visibility, backend="banded")
    (bias,) = visibility._of_window.values()
    assert bias.numel() < 700 * 700 / 10


@pytest.mark.parametrize("window", [64, None])
def test_what_is_kept_of_inference_mode_serves_training(window: int | None) -> None:
    banded_tiles._biases.cache_clear()
    visibility = Visibility.build(window=window)
    with torch.inference_mode():
        attention(heads(100), heads(100), heads(100), visibility, backend="banded")
    query = heads(100)
    attention(query, query, query, visibility, backend="banded").sum().backward()
    assert query.grad is not None


def test_a_workspace_hands_out_memory_that_does_not_overlap_and_is_used_again() -> None:
    def taken(*sizes: tuple[int, ...]) -> list[Tensor]:
        workspace = Workspace(torch.float32)
        return [workspace.empty(*size) for size in sizes]

    first, second = taken((3, 5), (7,))
    first.fill_(1.0)
    second.fill_(2.0)
    assert (first == 1.0).all()
    assert first.shape == (3, 5)
    assert taken((3, 5))[0].data_ptr() == taken((2,))[0].data_ptr()
    assert taken((BYTES,))[0].data_ptr() != taken((2,))[0].data_ptr()


@pytest.mark.parametrize("options", [{}, {"scale": 2.0}])
def test_the_scale_reaches_both_passes(options: dict[str, Any]) -> None:
    query, key, value = heads(100), heads(100), heads(100)
    gradients = [
        torch.autograd.grad(
            attention(query, key, value, Visibility.build(window=70), backend=backend, **options).sum(),
            (query, key, value),
        )
        for backend in ("banded", "reference")
    ]
    for ours, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, exact)
    assert not math.isnan(float(gradients[0][0].sum()))
