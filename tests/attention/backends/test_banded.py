"""`banded` against the reference, and what must hold bit by bit."""

import itertools

import pytest
import torch
from torch import Tensor

from windowlm.attention.backends import banded_blocks, banded_matmul, blockwise
from windowlm.attention.dispatch import attention
from windowlm.attention.window import Visibility

WINDOW = 130


@pytest.fixture(autouse=True, params=["matmul", "blocks", "blockwise"])
def way_over_the_band(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every test over the CPU's own way and over its slow twins, as on a GPU."""
    if request.param == "matmul":
        return
    twin = blockwise.attend if request.param == "blockwise" else banded_blocks.attend
    monkeypatch.setattr(banded_matmul, "attend", twin)


def heads(
    batch: int,
    queries: int,
    keys: int | None = None,
    *,
    kv_heads: int = 2,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(queries)
    shapes = [(batch, queries, 4, 16), *[(batch, keys or queries, kv_heads, 16)] * 2]
    query, key, value = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return query.requires_grad_(), key.requires_grad_(), value.requires_grad_()


def output_and_gradients(
    tensors: tuple[Tensor, Tensor, Tensor], visibility: Visibility, backend: str
) -> tuple[Tensor, ...]:
    output = attention(*tensors, visibility, backend=backend)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return output, *torch.autograd.grad(output, tensors, weights.to(output.dtype))


def assert_equal_to_reference(tensors: tuple[Tensor, Tensor, Tensor], visibility: Visibility) -> None:
    banded = output_and_gradients(tensors, visibility, "banded")
    reference = output_and_gradients(tensors, visibility, "reference")
    for ours, exact in zip(banded, reference, strict=True):
        torch.testing.assert_close(ours, exact, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("tokens", [1, 63, 100, WINDOW - 1, WINDOW, WINDOW + 1, 300])
@pytest.mark.parametrize("causal", [True, False])
def test_outputs_and_gradients_equal_the_reference(tokens: int, causal: bool) -> None:
    visibility = Visibility.build(window=WINDOW, causal=causal)
    assert_equal_to_reference(heads(2, tokens), visibility)


@pytest.mark.parametrize("window", [1, 2, 64, 1000])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_windows_and_group_sizes_equal_the_reference(window: int, kv_heads: int) -> None:
    assert_equal_to_reference(heads(1, 300, kv_heads=kv_heads), Visibility.build(window=window))


@pytest.mark.parametrize(
    ("window", "causal", "sinks"), list(itertools.product([None, 20, 150], [True, False], [0, 3, 21]))
)
def test_documents_padding_and_sinks_equal_the_reference(
    window: int | None, causal: bool, sinks: int
) -> None:
    documents_BT = torch.zeros(3, 300, dtype=torch.int32)
    documents_BT[0, 90:], documents_BT[0, 95:], documents_BT[0, 260:] = 1, 4, 5
    documents_BT[1, :200], documents_BT[1, 290:] = -1, -1
    documents_BT[2, 40:50], documents_BT[2, 150:] = -1, 1
    visibility = Visibility.build(window=window, causal=causal, sinks=sinks, documents_BT=documents_BT)
    assert_equal_to_reference(heads(3, 300), visibility)


@pytest.mark.parametrize("window", [None, 20, 300])
@pytest.mark.parametrize("sinks", [0, 3])
def test_one_row_of_documents_serves_batches_of_any_size(window: int | None, sinks: int) -> None:
    documents_BT = torch.cat([torch.arange(290)[None] // 110, torch.full((1, 10), -1)], dim=1)
    visibility = Visibility.build(window=window, sinks=sinks, documents_BT=documents_BT)
    for batch in (3, 1, 2):
        assert_equal_to_reference(heads(batch, 300), visibility)


@pytest.mark.parametrize("window", [None, 20, 150])
@pytest.mark.parametrize("queries", [1, 140])
def test_more_keys_than_queries_equal_the_reference(window: int | None, queries: int) -> None:
    assert_equal_to_reference(heads(2, queries, 200), Visibility.build(window=window, sinks=2))


def test_keys_in_the_order_of_a_ring_equal_the_reference() -> None:
    ring_positions_BS = torch.cat([torch.arange(50, 60), torch.arange(40, 50), torch.arange(60, 64)])[None]
    documents_BS = torch.zeros(1, 24, dtype=torch.int32)
    documents_BS[:, 15] = -1
    visibility = Visibility.build(
        window=12,
        positions_BT=torch.arange(60, 64)[None],
        documents_BT=torch.zeros(1, 4, dtype=torch.int32),
        key_positions_BS=ring_positions_BS,
        key_documents_BS=documents_BS,
    )
    assert_equal_to_reference(heads(1, 4, 24), visibility)


@pytest.mark.parametrize("tokens", [1, 63, 100, WINDOW - 1, WINDOW, WINDOW + 1, 300])
def test_each_query_sees_as_many_keys_as_the_window_counted_by_gradient(tokens: int) -> None:
    query, key, value = heads(1, tokens)
    output = attention(query, key, value, Visibility.build(window=WINDOW), backend="banded")
    for token in {0, tokens // 2, tokens - 1}:
        (gradient,) = torch.autograd.grad(output[0, token].sum(), value, retain_graph=True)
        seen = gradient[0].abs().sum((1, 2)) > 0
        assert seen.sum() == min(token + 1, WINDOW)
        assert seen[: token + 1].sum() == min(token + 1, WINDOW)


@pytest.mark.parametrize("window", [None, 50, 150])
def test_packed_documents_do_not_see_each_other_bitwise(window: int | None) -> None:
    documents_BT = (torch.arange(300) >= 170).int()[None]
    visibility = Visibility.build(window=window, documents_BT=documents_BT)
    query, key, value = heads(1, 300, dtype=torch.float32)
    before = attention(query, key, value, visibility, backend="banded")
    with torch.no_grad():
        for tensor in (query, key, value):
            tensor[:, :170] = 1000.0
    after = attention(query, key, value, visibility, backend="banded")
    assert torch.equal(before[:, 170:], after[:, 170:])
    assert not torch.equal(before[:, :170], after[:, :170])


@pytest.mark.parametrize("window", [None, 50, 150])
def test_what_a_query_cannot_see_changes_nothing_bitwise(window: int | None) -> None:
    query, key, value = heads(1, 300, dtype=torch.float32)
    visibility = Visibility.build(window=window)
    before = attention(query, key, value, visibility, backend="banded")
    with torch.no_grad():
        key[:, 200], value[:, 200] = 1e4, 1e4
    changed = (attention(query, key, value, visibility, backend="banded") != before).any(-1).any(-1)[0]
    assert not changed[:200].any()
    assert not changed[200 + (window or 300) :].any()
    assert changed[200 : 200 + (window or 300)].all()


@pytest.mark.parametrize("window", [None, 50, 150])
@pytest.mark.parametrize("padded", [False, True])
def test_rows_of_a_batch_equal_single_rows_bitwise(window: int | None, padded: bool) -> None:
    mask_BT = torch.ones(2, 300, dtype=torch.bool)
    mask_BT[1, 220:] = False
    tensors = heads(2, 300, dtype=torch.float32)
    both = output_and_gradients(
        tensors, Visibility.build(window=window, mask_BT=mask_BT if padded else None), "banded"
    )
    for row in range(2):
        alone = output_and_gradients(
            tuple(tensor[row : row + 1].detach().requires_grad_() for tensor in tensors),  # type: ignore[arg-type]
            Visibility.build(window=window, mask_BT=mask_BT[row : row + 1] if padded else None),
            "banded",
        )
        assert torch.equal(both[0][row], alone[0][0])


@pytest.mark.parametrize("backend", ["banded", "reference"])
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("everything", [False, True])
def test_queries_that_see_nothing_give_zeros_and_zero_gradients(
    backend: str, window: int | None, everything: bool
) -> None:
    mask_BT = torch.ones(1, 150, dtype=torch.bool)
    mask_BT[:, 0 if everything else 100 :] = False
    visibility = Visibility.build(window=window, mask_BT=mask_BT)
    for tensor in output_and_gradients(heads(1, 150), visibility, backend):
        assert tensor.isfinite().all()
        assert (tensor[~mask_BT] == 0).all()


@pytest.mark.parametrize("tokens", [1, 63, 100])
def test_a_window_over_all_tokens_is_exactly_full_attention(tokens: int) -> None:
    tensors = heads(2, tokens, dtype=torch.float32)
    windowed = output_and_gradients(tensors, Visibility.build(window=tokens), "banded")
    full = output_and_gradients(tensors, Visibility.build(window=None), "banded")
    for ours, whole in zip(windowed, full, strict=True):
        assert torch.equal(ours, whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_near_the_reference(dtype: torch.dtype) -> None:
    tensors = heads(1, 200, dtype=dtype)
    visibility = Visibility.build(window=70)
    for ours, exact in zip(
        output_and_gradients(tensors, visibility, "banded"),
        output_and_gradients(tensors, visibility, "reference"),
        strict=True,
    ):
        assert ours.dtype == dtype
        assert (ours - exact).norm() < 0.01 * exact.norm()


def test_dropout_keeps_the_mean_and_drops_some() -> None:
    query, key, _ = heads(1, 200)
    value = torch.ones_like(key)
    torch.manual_seed(0)
    output = attention(query, key, value, Visibility.build(window=70), backend="banded", dropout=0.5)
    assert output.mean().item() == pytest.approx(1.0, abs=0.05)
    assert output.std() > 0.01


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_threads_change_nothing_and_their_number_is_restored(kv_heads: int) -> None:
    documents_BT = (torch.arange(300) >= 170).int().expand(2, -1)
    visibility = Visibility.build(window=50, documents_BT=documents_BT)
    tensors = heads(2, 300, kv_heads=kv_heads, dtype=torch.float32)
    alone = output_and_gradients(tensors, visibility, "banded")
    torch.set_num_threads(3)
    try:
        together = output_and_gradients(tensors, visibility, "banded")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)
    for ours, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("huge", [3e38, -3e38])
def test_a_hidden_key_and_value_of_any_finite_size_change_no_output(huge: float) -> None:
    query, key, value = (tensor.detach() for tensor in heads(2, 300, dtype=torch.float32))
    visibility = Visibility.build(window=WINDOW)
    before = attention(query, key, value, visibility, backend="banded")
    key[:, 5] = value[:, 5] = huge
    changed = attention(query, key, value, visibility, backend="banded")
    for hidden in (slice(0, 5), slice(5 + WINDOW, None)):
        assert torch.equal(before[:, hidden], changed[:, hidden])


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_query_that_is_not_finite_reaches_no_other(wrong: float) -> None:
    query, key, value = (tensor.detach() for tensor in heads(2, 300, dtype=torch.float32))
    visibility = Visibility.build(window=WINDOW)
    before = attention(query, key, value, visibility, backend="banded")
    query[0, 150] = wrong
    changed = attention(query, key, value, visibility, backend="banded")
    others = torch.ones(2, 300, dtype=torch.bool)
    others[0, 150] = False
    torch.testing.assert_close(changed[others], before[others], rtol=0, atol=1e-6)
