"""The cache with layers of their own, and the order of its slots."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from windowlm import SlidingWindowAttention
from windowlm.attention.kv_cache import KVCache, Tail
from windowlm.attention.step_cache import StepCache
from windowlm.attention.window import Visibility

CPU = torch.device("cpu")


def test_slots_are_those_that_the_docstring_draws() -> None:
    cache = KVCache([4], [1])
    for token in range(10):
        cache.advance(1, 1, torch.device("cpu"))
        cache.layers[0].extend(*(torch.full((1, 1, 1, 1), float(token)) for _ in range(2)))
    kept = cache.layers[0].key_BSKD
    assert kept is not None
    assert kept.flatten().tolist() == [0, 9, 6, 7, 8]


@pytest.mark.parametrize("backend", ["reference", "banded"])
def test_layers_of_a_stack_stream_what_they_give_at_once(backend: str) -> None:
    torch.manual_seed(0)
    layers = [SlidingWindowAttention(16, 2, 8, window, 0.0, backend=backend) for window in (3, None, 7)]
    hidden_BTD = torch.randn(2, 40, 16)
    with torch.no_grad():
        whole_BTD = hidden_BTD
        for layer in layers:
            whole_BTD = layer(whole_BTD)
        cache = KVCache([layer.window_size for layer in layers], [layer.sinks for layer in layers])
        outputs = []
        for chunk_BTD in hidden_BTD.split([1, 9, 1, 1, 25, 3], 1):
            cache.advance(*chunk_BTD.shape[:2], chunk_BTD.device)
            for layer, kept in zip(layers, cache.layers, strict=True):
                chunk_BTD = layer(chunk_BTD, cache=kept)
            outputs.append(chunk_BTD)
    torch.testing.assert_close(torch.cat(outputs, 1), whole_BTD)


def test_a_layer_refuses_a_cache_that_is_not_its_own() -> None:
    hidden_BTD = torch.randn(1, 3, 16)
    layer = SlidingWindowAttention(16, 2, 8, 4)
    cache = KVCache([5, 4])
    with pytest.raises(ValueError, match=r"expects no tokens: call its advance\(\)"):
        layer(hidden_BTD, cache=cache.layers[1])
    cache.advance(1, 3, hidden_BTD.device)
    with pytest.raises(ValueError, match="cache has window=5, sinks=0, the layer window_size=4"):
        layer(hidden_BTD, cache=cache.layers[0])
    with pytest.raises(ValueError, match="expects 3 tokens, hidden_BTD has 2"):
        layer(hidden_BTD[:, :2], cache=cache.layers[1])
    with pytest.raises(ValueError, match="leave mask"):
        layer(hidden_BTD, torch.ones(1, 3, dtype=torch.bool), cache=cache.layers[1])
    with pytest.raises(ValueError, match="bidirectional"):
        SlidingWindowAttention(16, 2, 8, 4, causal=False)(hidden_BTD, cache=cache.layers[1])
    with pytest.raises(ValueError, match="cache is a KVCache: the layer's entry"):
        layer(hidden_BTD, cache=cache)  # type: ignore[arg-type]


def test_a_layer_reads_each_chunk_once_and_skips_none() -> None:
    layer, hidden_BTD = SlidingWindowAttention(16, 2, 8, 4, 0.0), torch.randn(2, 3, 16)
    with torch.no_grad():
        cache = KVCache([4])
        cache.advance(2, 3, CPU)
        layer(hidden_BTD, cache=cache.layers[0])
        with pytest.raises(ValueError, match="has read 3 tokens of the cache, and the chunk begins at 0"):
            layer(hidden_BTD, cache=cache.layers[0])
        cache.advance(2, 3, CPU)
        cache.advance(2, 3, CPU)
        with pytest.raises(ValueError, match="has read 3 tokens of the cache, and the chunk begins at 6"):
            layer(hidden_BTD, cache=cache.layers[0])
        with pytest.raises(ValueError, match="a cache that a layer has not read to its end"):
            StepCache(cache)


@pytest.mark.parametrize("options", [{"backend": "reference"}, {"dropout": 0.5}])
def test_a_step_refuses_what_it_would_not_honour(options: dict[str, Any]) -> None:
    layer, hidden_BTD = (
        SlidingWindowAttention(16, 2, 8, 4, **{"dropout": 0.0, **options}),
        torch.randn(2, 3, 16),
    )
    with torch.no_grad():
        cache = KVCache([4])
        cache.advance(2, 3, CPU)
        layer(hidden_BTD, cache=cache.layers[0])
        steps = StepCache(cache)
        steps.advance(2, 1, CPU)
        with pytest.raises(ValueError, match=r"a StepCache computes in one way"):
            layer(hidden_BTD[:, :1], cache=steps.layers[0])


def test_a_step_refuses_gradients() -> None:
    layer, hidden_BTD, cache = SlidingWindowAttention(16, 2, 8, 4, 0.0), torch.randn(2, 3, 16), KVCache([4])
    with torch.no_grad():
        cache.advance(2, 3, CPU)
        layer(hidden_BTD, cache=cache.layers[0])
    steps = StepCache(cache)
    steps.advance(2, 1, CPU)
    with pytest.raises(ValueError, match="a KV cache carries no gradients"):
        layer(hidden_BTD[:, :1], cache=steps.layers[0])


def test_a_cache_refuses_keys_of_other_sizes() -> None:
    hidden_BTD = torch.randn(2, 3, 16)
    first, other = (
        SlidingWindowAttention(16, 2, 8, 4, 0.0),
        SlidingWindowAttention(16, 2, 8, 4, 0.0, kv_heads=1),
    )
    cache = KVCache([4])
    with torch.no_grad():
        cache.advance(2, 3, CPU)
        first(hidden_BTD, cache=cache.layers[0])
        cache.advance(2, 3, CPU)
        with pytest.raises(ValueError, match="the cache holds 2 rows of 2 heads of 8, the layer gives"):
            other(hidden_BTD, cache=cache.layers[0])


@pytest.mark.parametrize("chunks", [1, 2])
def test_a_cache_refuses_other_rows_than_it_was_told(chunks: int) -> None:
    layer, cache = SlidingWindowAttention(16, 2, 8, 4, 0.0), KVCache([4])
    with torch.no_grad():
        for _ in range(chunks - 1):
            cache.advance(2, 3, CPU)
            layer(torch.randn(2, 3, 16), cache=cache.layers[0])
        cache.advance(2, 3, CPU)
        for rows in (1, 3):
            with pytest.raises(ValueError, match=f"the cache expects 2 rows, hidden_BTD has {rows}"):
                layer(torch.randn(rows, 3, 16), cache=cache.layers[0])


@pytest.mark.parametrize("documents_BT", [None, torch.tensor([[0] * 4 + [1] * 5, [2] * 9])])
@pytest.mark.parametrize("window", [4, None])
def test_a_cache_goes_on_in_and_out_of_inference_mode(
    window: int | None, documents_BT: torch.Tensor | None
) -> None:
    layer = SlidingWindowAttention(16, 2, 8, window, 0.0, sinks=1, short_convolution=2)
    hidden_BTD, cache, outputs = torch.randn(2, 9, 16), KVCache([window], [1]), []
    for start, stop, mode in (
        (0, 5, torch.inference_mode),
        (5, 7, torch.no_grad),
        (7, 8, torch.inference_mode),
        (8, 9, torch.no_grad),
    ):
        with mode():
            documents = None if documents_BT is None else documents_BT[:, start:stop]
            cache.advance(2, stop - start, CPU, documents)
            outputs.append(layer(hidden_BTD[:, start:stop], cache=cache.layers[0]))
    visibility = Visibility.build(window=window, sinks=1, documents_BT=documents_BT)
    torch.testing.assert_close(torch.cat(outputs, 1), layer(hidden_BTD, visibility=visibility))


def test_a_tail_keeps_the_last_few_entries() -> None:
    tail, given = Tail(3), []
    for size in (2, 1, 5, 1):
        earlier = tail.exchange(torch.arange(sum(given), sum(given) + size)[None])
        given.append(size)
        if len(given) > 1:
            assert earlier is not None
            first = sum(given[:-1])
            assert earlier[0].tolist() == list(range(max(first - 3, 0), first))
        else:
            assert earlier is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: KVCache(5), "windows=5: a list"),
        (lambda: KVCache("57"), "windows='57': a list"),
        (lambda: KVCache([5], 1), "sinks=1: a list"),
        (lambda: KVCache([]), "windows=[]: a list"),
        (lambda: KVCache([5, 7], [1]), "1 sinks for 2 windows"),
        (lambda: KVCache([5, 0]), "windows[1]=0: "),
        (lambda: KVCache([5, 7], [1, -1]), "sinks[1]=-1: "),
        (lambda: KVCache([5], dtype="float32"), "dtype='float32': a floating-point dtype"),
        (lambda: KVCache([5], dtype=torch.int64), "dtype=torch.int64"),
        (lambda: KVCache([5]).advance(0, 4, CPU), "batch=0: a whole number from 1 on"),
        (lambda: KVCache([5]).advance(True, 4, CPU), "batch=True"),
        (lambda: KVCache([5]).advance(1, 0, CPU), "tokens=0"),
        (lambda: KVCache([5]).advance(1, -1, CPU), "tokens=-1"),
        (lambda: KVCache([5]).advance(1, 2, CPU, torch.zeros(1, 2)), "documents_BT is torch.float32"),
        (lambda: KVCache([5]).advance(1, 2, CPU, [[0, 0]]), "documents_BT is list"),
        (
            lambda: KVCache([5]).advance(1, 2, CPU, torch.tensor([[0, 2**32]])),
            "from 0 to 4294967296: a cache",
        ),
        (lambda: KVCache([5]).advance(1, 2, CPU, torch.tensor([[0, 2**32 - 1]])), "below 2**31"),
        (lambda: KVCache([5]).advance(1, 2, "cpu"), "device='cpu': a torch.device is allowed"),
        (
            lambda: KVCache([5]).advance(1, 2, CPU, torch.zeros(1, 2, dtype=torch.int64, device="meta")),
            "documents_BT is on meta, device=cpu",
        ),
    ],
)
def test_what_a_cache_cannot_be_made_of_is_refused_by_name(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
