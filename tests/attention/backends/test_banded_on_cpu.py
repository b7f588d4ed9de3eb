"""What the band's own dropout draws, where it is handed on, and that its ways agree."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from windowlm.attention.backends import banded_matmul, banded_plan, banded_threads, banded_tiles
from windowlm.attention.dispatch import attention
from windowlm.attention.window import Visibility


def heads(tokens: int, count: int = 2, dim: int = 8, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(1, tokens, count, dim, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize(
    ("window", "sinks", "logit_cap"),
    [(5, 0, None), (5, 3, None), (None, 0, None), (5, 3, 2.0), (None, 0, 2.0)],
)
def test_the_gradients_are_those_of_the_weights_that_were_dropped(
    window: int | None, sinks: int, logit_cap: float | None
) -> None:
    torch.manual_seed(0)
    visibility = Visibility.build(window=window, sinks=sinks)

    def with_fixed_draws(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        torch.manual_seed(1)
        return attention(query, key, value, visibility, backend="banded", dropout=0.4, logit_cap=logit_cap)

    tensors = heads(140, 4, 2), heads(140, 2, 2), heads(140, 2, 2)
    assert torch.autograd.gradcheck(with_fixed_draws, tensors, fast_mode=True)


@pytest.mark.parametrize("logit_cap", [None, 1.0])
def test_the_weights_kept_are_scaled_and_as_many_as_the_probability_says(logit_cap: float | None) -> None:
    torch.manual_seed(1)
    tokens, window, dropout = 64, 64, 0.3
    query = torch.zeros(1, tokens, 3, 64)
    value = torch.eye(64)[None, :, None].expand(1, -1, 3, -1).contiguous()
    visibility = Visibility.build(window=window - 1)
    weights = attention(
        query, query, value, visibility, backend="banded", dropout=dropout, logit_cap=logit_cap
    )
    usual = attention(query, query, value, visibility, backend="banded")
    seen, kept = usual > 0, weights > 0
    assert not (kept & ~seen).any()
    torch.testing.assert_close(weights[kept], usual[kept] / (1 - dropout), atol=1e-6, rtol=1e-4)
    share = kept.sum() / seen.sum()
    assert abs(share - (1 - dropout)) < 4 * (dropout * (1 - dropout) / seen.sum()).sqrt()
    assert not torch.equal(kept[0, :, 0], kept[0, :, 1])


def test_draws_follow_the_seed_and_not_the_number_of_threads() -> None:
    query = heads(200, 4, dtype=torch.float32)
    visibility = Visibility.build(window=20)
    outputs = []
    for threads, seed in ((1, 0), (2, 0), (1, 1)):
        torch.set_num_threads(threads)
        torch.manual_seed(seed)
        outputs.append(attention(query, query, query, visibility, backend="banded", dropout=0.2))
    torch.set_num_threads(1)
    torch.testing.assert_close(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2])


@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize(
    "given",
    [
        {"window": 30},
        {"window": 30, "causal": False},
        {"window": 400},
        {"window": 30, "sinks": 3},
        {"window": 50, "documents_BT": (torch.arange(500)[None] // 90).int()},
        {"window": 50, "documents_BT": (torch.arange(500)[None] // 90 - 3).clamp(-1).int()},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_threads_that_outnumber_the_heads_share_the_blocks(
    kv_heads: int, given: dict[str, Any], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    tensors = [heads(500, count, dtype=dtype) for count in (2 * kv_heads, kv_heads, kv_heads)]
    gradient = torch.randn_like(tensors[0])
    results = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        try:
            mixed = attention(*tensors, Visibility.build(**given), backend="banded")
            results.append((mixed, *torch.autograd.grad(mixed, tensors, gradient)))
        finally:
            torch.set_num_threads(1)
    for shared in results[1:]:
        for ours, alone in zip(shared, results[0], strict=True):
            torch.testing.assert_close(ours, alone)


def test_the_parts_of_a_row_are_all_its_blocks_each_once() -> None:
    for tokens, window, parts in ((500, 30, 7), (300, 200, 2), (64, 10, 3), (700, 5, 4)):
        plan = banded_plan.make_plan(Visibility.build(window=window), tokens, tokens)
        seen = []
        for part in range(parts):
            share = banded_threads.Share(0, slice(0, 1), slice(0, 1), part, parts)
            for block in banded_plan.blocks_of(plan, share, tokens, 1, 1, torch.float32):
                if isinstance(block, banded_plan.Block):
                    seen += list(range(tokens)[block.queries])
                else:
                    seen += range(block.first_query, block.first_query + block.blocks * block.block)
        assert seen == list(range(tokens))


def test_blocks_are_kept_as_long_as_their_plan_unless_masks_are_large(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    share = banded_threads.Share(0, slice(0, 2), slice(0, 2))
    documents_BT = (torch.arange(600)[None] // 70).int()
    packed = Visibility.build(window=40, documents_BT=documents_BT)
    before = len(banded_plan._kept)
    plans = [banded_plan.make_plan(seen, 600, 600) for seen in (Visibility.build(window=40), packed)]
    for plan in plans:
        laid_out = [
            list(banded_plan.blocks_of(plan, share, 600, *call))
            for call in ((2, 1, torch.float32), (2, 1, torch.float64), (1, 2, torch.float32)) * 2
        ]
        for first, again in zip(laid_out[:3], laid_out[3:], strict=True):
            assert [block.bias.data_ptr() for block in first] == [block.bias.data_ptr() for block in again]
        assert {block.bias.dtype for block in laid_out[1]} == {torch.float64}
    assert len(banded_plan._kept) == before + 2
    # Rows whose blocks are alike have them together.
    banded_plan.blocks_of(plans[0], share._replace(row=7), 600, 2, 1, torch.float32)
    assert len(banded_plan._kept[plans[0].blocks]) == 3
    del plan
    plans.clear()
    assert len(banded_plan._kept) == before
    monkeypatch.setattr(banded_plan, "MOST_KEPT", 1000)
    plan = banded_plan.make_plan(packed, 600, 600)
    blocks = list(banded_plan.blocks_of(plan, share, 600, 2, 1, torch.float32))
    assert blocks
    assert len(banded_plan._kept) == before


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("window", "queries", "keys", "starts"),
    [
        (1, 200, 200, []),
        (17, 200, 200, []),
        (40, 200, 200, [64]),
        (40, 50, 50, [50]),
        (256, 1000, 1000, [256]),
        (257, 1000, 1000, [256]),
        (300, 1000, 1000, [256, 64]),
        (300, 1000, 1200, [128]),
        (300, 1000, 1290, []),
        (700, 1500, 1500, [256, 256, 192]),
    ],
)
def test_blocks_that_lack_keys_before_them_are_joined(
    window: int, queries: int, keys: int, starts: list[int], causal: bool
) -> None:
    torch.manual_seed(0)
    visibility = Visibility.build(window=window, causal=causal)
    plan = banded_plan.make_plan(visibility, queries, keys)
    whole = banded_threads.Share(0, slice(0, 1), slice(0, 2))
    blocks = list(banded_plan.blocks_of(plan, whole, queries, 1, 2, torch.float64))
    sizes = [len(block.bias) for block in blocks[: len(plan.hidden)]]
    assert sizes == starts
    if not causal and queries < keys:
        return  # no backend takes it
    tensors = heads(queries), heads(keys, 1), heads(keys, 1)
    gradient = torch.randn_like(tensors[0])
    ours, exact = (
        (mixed, *torch.autograd.grad(mixed, tensors, gradient))
        for mixed in (attention(*tensors, visibility, backend=name) for name in ("banded", "reference"))
    )
    for tensor, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(tensor, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 8), (32, 32), (12, 12)])
def test_the_start_of_a_row_leaves_the_shares_of_heads_even(heads: int, kv_heads: int) -> None:
    plan = banded_plan.make_plan(Visibility.build(window=512), 4096, 4096)
    torch.set_num_threads(2)
    try:
        shares = banded_matmul._shares(
            torch.empty(1, 4096, heads, 1), torch.empty(1, 4096, kv_heads, 1), plan, 0.0
        )
    finally:
        torch.set_num_threads(1)
    assert {share.kv_heads.stop - share.kv_heads.start for share in shares} == {kv_heads // 2}


@pytest.mark.parametrize(("window", "packed"), [(40, False), (256, False), (40, True)])
def test_a_part_of_the_tokens_has_room_for_the_keys_that_it_meets_alone(window: int, packed: bool) -> None:
    documents_BT = (torch.arange(3000)[None] // 700).int() if packed else None
    plan = banded_plan.make_plan(Visibility.build(window=window, documents_BT=documents_BT), 3000, 3000)
    for part in range(5):
        share = banded_threads.Share(0, slice(0, 3), slice(0, 3), part, 5)
        met = banded_plan.keys_met(plan, share, 3000)
        spans = [
            block.span if isinstance(block, banded_plan.Run) else block.keys
            for block in banded_plan.blocks_of(plan, share, 3000, 3, 1, torch.float32)
        ]
        assert met == slice(min(span.start for span in spans), max(span.stop for span in spans))
        assert met.stop - met.start <= 3000 // 5 + 256 + window


@pytest.mark.parametrize(("window", "most"), [(800, 3000 + 5 * (800 + 112)), (3000, 5 * 3000 * 4 // 5)])
def test_a_part_of_the_keys_returns_the_gradients_of_the_queries_that_see_it(
    window: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, tokens, returned = 5, 3000, []

    def recorded(compute: Any, shares: Any) -> Any:
        results = banded_threads.in_parallel(compute, shares)
        returned.extend(zip(shares, results, strict=True))
        return results

    torch.set_num_threads(threads)
    try:
        torch.manual_seed(0)
        tensors = [torch.randn(1, tokens, 2, 16, requires_grad=True) for _ in range(3)]
        with monkeypatch.context() as patch:
            patch.setattr(banded_tiles, "in_parallel", recorded)
            attention(*tensors, Visibility.build(window=window), backend="banded").sum().backward()
    finally:
        torch.set_num_threads(1)
    assert {share.parts for share, _ in returned} == {threads}
    assert sum(len(part_THD) for _, (_, part_THD) in returned) < most
    by_parts = [tensor.grad for tensor in tensors]
    for tensor in tensors:
        tensor.grad = None
    attention(*tensors, Visibility.build(window=window), backend="banded").sum().backward()
    for tensor, by_part in zip(tensors, by_parts, strict=True):
        torch.testing.assert_close(tensor.grad, by_part)


@pytest.mark.parametrize("size", [1.0, 3.0])
@pytest.mark.parametrize("tokens", [300, 600, 1000, 1200])
@pytest.mark.parametrize(("kv_heads", "head_dim", "compared"), [(1, 8, slice(2, 3)), (2, 64, slice(3))])
def test_sums_over_all_queries_that_see_a_key_round_as_little_as_plainly(
    kv_heads: int, head_dim: int, compared: slice, tokens: int, size: float
) -> None:
    torch.manual_seed(0)
    query, gradient = (torch.randn(2, tokens, 8, head_dim) for _ in range(2))
    key, value = (torch.randn(2, tokens, kv_heads, head_dim) for _ in range(2))

    def gradients(backend: str, dtype: torch.dtype) -> list[Tensor]:
        tensors = [tensor.to(dtype).requires_grad_() for tensor in (query * size, key * size, value)]
        output = attention(*tensors, Visibility.build(window=tokens), backend=backend)
        of_tensors = torch.autograd.grad(output, tensors, gradient.to(dtype))
        return [tensor.double() for tensor in of_tensors[compared]]

    exact = gradients("reference", torch.float64)
    of_both = gradients("banded", torch.float32), gradients("reference", torch.float32)
    for ours, plain, expected in zip(*of_both, exact, strict=True):
        assert (ours - expected).norm() <= 2 * (plain - expected).norm()


@pytest.mark.parametrize(
    ("whole", "size", "runs"),
    [
        ([True] * 24, 18, [(0, 24)]),
        ([True] * 25, 18, [(0, 12), (12, 13)]),
        ([True] * 3, 1, [(0, 1), (1, 1), (2, 1)]),
        ([False, False, True, True, True, False], 8, [(0, 1), (1, 1), (2, 3), (5, 1)]),
        ([], 8, []),
    ],
)
def test_runs_are_even_and_no_small_rest_stands_alone(
    whole: list[bool], size: int, runs: list[tuple[int, int]]
) -> None:
    assert list(banded_plan._runs(whole, size)) == runs


@pytest.mark.parametrize("sinks", [0, 3])
def test_dropout_and_sinks_compile_into_one_graph(sinks: int) -> None:
    def attend(query: Tensor) -> Tensor:
        visibility = Visibility.build(window=20, sinks=sinks)
        return attention(query, query, query, visibility, backend="banded", dropout=0.2)

    torch._dynamo.reset()
    query = heads(100)
    (gradient,) = torch.autograd.grad(
        torch.compile(attend, fullgraph=True, backend="aot_eager")(query).sum(), query
    )
    assert gradient.isfinite().all()


def test_the_gradient_of_a_learned_sink_is_rounded_once_and_not_at_each_block() -> None:
    visibility = Visibility.build(window=None)
    for seed in range(8):
        torch.manual_seed(seed)
        tensors = [heads(1000, 1).bfloat16() for _ in range(3)]

        def sink_gradient(backend: str, tensors: list[Tensor] = tensors) -> Tensor:
            sink_logits_H = torch.zeros(1, dtype=torch.bfloat16, requires_grad=True)
            mixed = attention(*tensors, visibility, backend=backend, sink_logits_H=sink_logits_H)
            return torch.autograd.grad(mixed, sink_logits_H, tensors[0].abs())[0]

        assert torch.equal(sink_gradient("banded"), sink_gradient("reference"))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("window", "causal"), [(20, True), (20, False), (100, True), (200, True)])
def test_blocks_taken_together_and_alone_give_the_same(
    window: int, causal: bool, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    tensors = heads(700, 4), heads(700), heads(700)
    gradient = torch.randn_like(tensors[0])
    documents_BT = (torch.arange(700)[None] >= 150).int() if packed else None
    results, kinds = [], []
    for scores in (banded_plan.RUN, 1):
        monkeypatch.setattr(banded_plan, "RUN", scores)
        monkeypatch.setattr(banded_plan, "START_BLOCK", min(scores, banded_plan.START_BLOCK))
        visibility = Visibility.build(window=window, causal=causal, documents_BT=documents_BT)
        plan = banded_plan.make_plan(visibility, 700, 700)
        whole = banded_threads.Share(0, slice(0, 2), slice(0, 4))
        kinds.append({type(block) for block in banded_plan.blocks_of(plan, whole, 700, 2, 2, torch.float64)})
        mixed = attention(*tensors, visibility, backend="banded")
        results.append((mixed, *torch.autograd.grad(mixed, tensors, gradient)))
    assert kinds == [{banded_plan.Block, banded_plan.Run}, {banded_plan.Block}]
    for together, alone in zip(*results, strict=True):
        torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("device", ["meta"])
@pytest.mark.parametrize(
    "given",
    [
        {"window": 20},
        {"window": 200},
        {"window": None},
        {"window": 900},
        {"window": 20, "sinks": 3},
        {"window": 20, "causal": False},
        {"window": 50, "documents_BT": (torch.arange(1000)[None] // 90).int()},
        {"window": None, "documents_BT": (torch.arange(1000)[None] // 90).int()},
    ],
)
def test_another_default_device_changes_nothing(given: dict[str, Any], device: str) -> None:
    tensors = [heads(1000, count, dtype=torch.float32) for count in (2, 1, 1)]
    results = []
    for context in (nullcontext(), torch.device(device)):
        visibility = Visibility.build(**given)
        with context:
            mixed = attention(*tensors, visibility, backend="banded")
            gradients = torch.autograd.grad(mixed, tensors, tensors[0].detach())
            torch.manual_seed(0)
            dropped = attention(*tensors, visibility, backend="banded", dropout=0.5)
        results.append((mixed, dropped, *gradients))
    for there, here in zip(*results, strict=True):
        assert torch.equal(there, here)


@pytest.mark.parametrize("given", [{"window": 20}, {"window": None}, {"window": None, "causal": False}])
def test_one_graph_of_unknown_sizes_serves_them(given: dict[str, Any]) -> None:
    def attend(query: Tensor, key: Tensor) -> Tensor:
        return attention(query, key, key, Visibility.build(**given), backend="banded")

    torch.compiler.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (60, 70):
        query, key = heads(tokens, 4), heads(tokens, 2)
        torch.testing.assert_close(compiled(query, key), attend(query, key))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("documents", [False, True])
def test_autocast_decides_no_dtype_whatever_the_window(documents: bool, causal: bool) -> None:
    query, key, value = (torch.randn(1, 300, heads, 8) for heads in (2, 1, 1))
    documents_BT = (torch.arange(300) // 100).int()[None] if documents else None
    for window in (1, 20, 299, 300, None):
        visibility = Visibility.build(window=window, causal=causal, documents_BT=documents_BT)
        plain = attention(query, key, value, visibility, backend="banded")
        with torch.autocast("cpu", torch.bfloat16):
            output = attention(query, key, value, visibility, backend="banded")
        assert output.dtype == torch.float32
        torch.testing.assert_close(output, plain, rtol=0, atol=0)
