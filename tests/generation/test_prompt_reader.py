"""Prompts that one graph reads leave what the model leaves in the cache, whatever the chunks."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from windowlm.attention.kv_cache import KVCache
from windowlm.errors import UserError
from windowlm.generation.prompt_reader import PromptReader
from windowlm.model.compiled_for_windows import compiled_for_windows
from windowlm.model.config import ModelConfig, NgramEmbeddingsConfig
from windowlm.model.decoder import Decoder

SHAPE = {"layers": 2, "dim": 16, "heads": 2, "kv_heads": 1, "head_dim": 8, "feed_forward_dim": 16}
PLAIN: dict[str, Any] = {"window": 6}
SINKS: dict[str, Any] = {"window": [5, None], "attention_sinks": 2, "learned_sinks": True, "qk_norm": True}
READS_BEHIND: dict[str, Any] = {
    "window": 6,
    "short_convolution": 3,
    "ngram_embeddings": NgramEmbeddingsConfig(orders=[2, 4], buckets=64),
    "value_embeddings": 1,
    "embedding_residual": True,
}
VOCABULARY, PADDED = 50, 4


@pytest.fixture(autouse=True)
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs are traced whole, and computed as they stand."""
    torch.compiler.reset()
    compiled_for_windows.cache_clear()
    counters.clear()
    compile_it: Callable[..., Any] = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda function, fullgraph, **_: compile_it(function, fullgraph=fullgraph, backend="eager"),
    )
    yield
    compiled_for_windows.cache_clear()


def read(
    model: Decoder, tokens_BT: torch.Tensor, chunks: list[int], dtype: torch.dtype | None, **given: Any
) -> tuple[list[torch.Tensor], KVCache]:
    reader, cache = PromptReader(model, compiled=given["compiled"]), model.new_cache(dtype=dtype)
    documents_BT = torch.zeros_like(tokens_BT, dtype=torch.int32)
    documents_BT[0, :PADDED] = -1
    states, start = [], 0
    for chunk in chunks:
        columns = slice(start, start + chunk)
        states.append(
            reader(tokens_BT[:, columns], documents_BT[:, columns] if given["padded"] else None, cache)
        )
        start += chunk
    return states, cache


@pytest.mark.parametrize(
    ("chunks", "switches", "padded", "dtype"),
    [
        ([2], PLAIN, False, None),
        ([40, 1, 33, 50], PLAIN, False, torch.bfloat16),
        ([40, 1, 33], PLAIN, True, None),
        ([5, 6, 7], SINKS, False, None),
        ([3, 2, 5, 11, 6, 7], SINKS, False, None),
        ([2, 4, 2, 13, 6, 5, 7], PLAIN, False, torch.bfloat16),
        ([40, 33], SINKS, True, torch.bfloat16),
        ([5, 6, 7], READS_BEHIND, False, None),
        ([40, 1, 33], READS_BEHIND, True, None),
    ],
)
def test_a_graph_leaves_what_the_model_leaves(
    chunks: list[int], switches: dict[str, Any], padded: bool, dtype: torch.dtype | None
) -> None:
    torch.manual_seed(0)
    model = Decoder(ModelConfig(**SHAPE, **switches), VOCABULARY).eval()
    tokens_BT = torch.randint(0, VOCABULARY, (2, sum(chunks) + 9))
    whole = partial(read, model, tokens_BT, chunks, dtype, padded=padded)
    (wanted, plain), (found, cache) = whole(compiled=False), whole(compiled=True)
    assert counters["stats"]["unique_graphs"] > 0
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert cache.bytes_held == plain.bytes_held
    for kept, of_plain in zip(cache.layers, plain.layers, strict=True):
        for name in ("key_BSKD", "value_BSKD"):
            slots_BSKD, wanted_BSKD = getattr(kept, name), getattr(of_plain, name)
            assert slots_BSKD.dtype == wanted_BSKD.dtype
            assert slots_BSKD.is_contiguous()
            torch.testing.assert_close(slots_BSKD, wanted_BSKD, rtol=1e-2 if dtype else 0, atol=1e-5)
    # What follows finds the same keys, and the same of what is read behind.
    with torch.no_grad():
        for chunk_BT in (tokens_BT[:, -9:-8], tokens_BT[:, -8:]):
            following = (model(chunk_BT, cache=each) for each in (cache, plain))
            torch.testing.assert_close(*following, rtol=0, atol=1e-5)


def test_chunks_of_other_lengths_and_batches_compile_nothing_anew() -> None:
    model = Decoder(ModelConfig(**SHAPE, **PLAIN), VOCABULARY).eval()
    for batch, first, second in ((2, 40, 50), (3, 77, 33), (5, 64, 90)):
        tokens_BT = torch.randint(0, VOCABULARY, (batch, first + second))
        read(model, tokens_BT, [first, second], None, compiled=True, padded=False)
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("sinks", [0, 2])
def test_rows_that_differ_compile_nothing_anew_at_another_length(sinks: int) -> None:
    model = Decoder(ModelConfig(**SHAPE, window=32, attention_sinks=sinks), VOCABULARY).eval()
    for length in (65, 127, 200, 300):
        tokens_BT = torch.randint(0, VOCABULARY, (2, length))
        read(model, tokens_BT, [length], None, compiled=True, padded=True)
    # One block of queries, or several.
    assert counters["stats"]["unique_graphs"] <= 2


def test_more_graphs_than_are_allowed_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("windowlm.generation.prompt_reader.MOST_GRAPHS", 1)
    model = Decoder(ModelConfig(**SHAPE, **PLAIN), VOCABULARY).eval()
    tokens_BT = torch.randint(0, VOCABULARY, (2, 40))
    with pytest.raises(UserError, match="compile=true: these prompts take more than 1 graphs"):
        read(model, tokens_BT, [20, 20], None, compiled=True, padded=False)
