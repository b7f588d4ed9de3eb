"""Text that comes in chunks: the logits of one call, whatever the chunks."""

from collections.abc import Iterator

import pytest
import torch

from tests.model.test_switches import SWITCHES, VOCABULARY, tokens
from windowlm.attention.config import RotaryConfig
from windowlm.attention.document_layout import PADDING
from windowlm.model.config import ModelConfig
from windowlm.model.cost import model_cost
from windowlm.model.decoder import Decoder

WINDOW, SMALLER = 8, 5
LENGTH = 67  # the cache of a full layer grows at 64
ROTARY = [RotaryConfig(base=100.0, fraction=0.5), None, RotaryConfig()]
CHUNKS = {
    "1": [1],
    "3": [3],
    "W - 1": [WINDOW - 1],
    "W": [WINDOW],
    "W + 1": [WINDOW + 1],
    "2 W": [2 * WINDOW],
    "mixed": [1, 1, 20, 3, 1, 9, 1, 2, 8],
    "prompt": [41, *[1] * 12, LENGTH],
}
LAYERS: dict[str, dict[str, object]] = {
    "windows": {"window": [WINDOW, SMALLER]},
    "a window of one": {"window": [1, WINDOW]},
    "a full layer": {"window": [WINDOW, None, SMALLER]},
    "full": {"window": None},
    "sinks": {"window": [WINDOW, SMALLER, None], "attention_sinks": 3},
    "many sinks": {"window": [2, WINDOW], "attention_sinks": 12},
    "learned sinks, gate, cap": {
        "window": [WINDOW, None],
        "learned_sinks": True,
        "output_gate": True,
        "logit_cap": 5.0,
        "attention_sinks": 2,
    },
    "list of rotaries": {"window": [WINDOW, WINDOW, None], "rotary": ROTARY},
    **{name: {"window": [WINDOW, None], "attention_sinks": 1, **on} for name, on in SWITCHES.items()},
}
each_chunking = pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
# What switches keep of earlier tokens does not depend on the window: a chunk is shorter or longer than it.
OF_SWITCHES = ("1", "W + 1", "mixed")
each_case = pytest.mark.parametrize(
    ("layers", "chunks"),
    [
        pytest.param(layers, chunks, id=f"{name}-{number}")
        for name, layers in LAYERS.items()
        for number, chunks in CHUNKS.items()
        if name not in SWITCHES or name in ("plain", "all") or number in OF_SWITCHES
    ],
)


def drawn(layers: dict[str, object]) -> Decoder:
    """A model whose attention is far from uniform, so that a key too many or too few shows."""
    torch.manual_seed(0)
    shape = {"layers": 3, "dim": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "feed_forward_dim": 48}
    model = Decoder(ModelConfig(**{**shape, **layers}), VOCABULARY)  # type: ignore[arg-type]
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4 if parameter.dim() > 1 else 1.0)
    return model.eval()


def cut(length: int, chunks: list[int]) -> Iterator[slice]:
    """Places of the chunks in a row, sizes repeated until it ends."""
    start = 0
    while start < length:
        for size in chunks:
            yield slice(start, min(start + size, length))
            start += size
            if start >= length:
                return


@torch.no_grad()
def streamed(
    model: Decoder,
    tokens_BT: torch.Tensor,
    chunks: list[int],
    documents_BT: torch.Tensor | None = None,
    *,
    goes_on_from: int | None = None,
    capacity: int | None = None,
) -> torch.Tensor:
    """Logits chunk by chunk; from `goes_on_from` on, documents are left to the cache."""
    cache, logits = model.new_cache(capacity), []
    for place in cut(tokens_BT.shape[1], chunks):
        documents = None
        if documents_BT is not None and (goes_on_from is None or place.start < goes_on_from):
            documents = documents_BT[:, place]
        logits.append(model(tokens_BT[:, place], documents, cache=cache))
    return torch.cat(logits, 1)


def assert_same(streamed_BTV: torch.Tensor, whole_BTV: torch.Tensor) -> None:
    """1e-5 of logits of about 1; here they are of other sizes."""
    torch.testing.assert_close(streamed_BTV, whole_BTV, rtol=0, atol=1e-5 * float(whole_BTV.std()))


@each_case
def test_logits_are_those_of_one_call(layers: dict[str, object], chunks: list[int]) -> None:
    model, tokens_BT = drawn(layers).double(), tokens(2, LENGTH)
    with torch.no_grad():
        whole_BTV = model(tokens_BT)
    for capacity in (None, LENGTH) if len(chunks) > 1 else (None,):
        assert_same(streamed(model, tokens_BT, chunks, capacity=capacity), whole_BTV)


def packed() -> torch.Tensor:
    """Padding on the left, short and long documents, and the last one going on."""
    rows = [
        [PADDING] * 11 + [0] * (LENGTH - 11),
        [PADDING] * 30 + [2] * 3 + [4] * 2 + [5] * (LENGTH - 35),
        [0] * 2 + [1] * 12 + [2] * 1 + [3] * 23 + [7] * (LENGTH - 38),
        [3] * LENGTH,
    ]
    return torch.tensor(rows)


@each_case
def test_packed_and_padded_rows_are_those_of_one_call(layers: dict[str, object], chunks: list[int]) -> None:
    model, tokens_BT, documents_BT = drawn(layers).double(), tokens(4, LENGTH), packed()
    with torch.no_grad():
        whole_BTV = model(tokens_BT, documents_BT)
    real_BT = documents_BT != PADDING
    for goes_on_from in (None, 40) if len(chunks) > 1 else (None,):
        got_BTV = streamed(model, tokens_BT, chunks, documents_BT, goes_on_from=goes_on_from)
        assert_same(got_BTV[real_BT], whole_BTV[real_BT])


@each_chunking
def test_padding_between_tokens_of_one_document_counts_as_in_one_call(chunks: list[int]) -> None:
    model, tokens_BT = drawn(LAYERS["all"] | {"attention_sinks": 3}).double(), tokens(2, LENGTH)
    documents_BT = torch.zeros(2, LENGTH, dtype=torch.int64)
    documents_BT[0, 1:3] = documents_BT[0, 40:43] = documents_BT[1, 60:] = documents_BT[1, 0] = PADDING
    with torch.no_grad():
        whole_BTV = model(tokens_BT, documents_BT)
    real_BT = documents_BT != PADDING
    assert_same(streamed(model, tokens_BT, chunks, documents_BT)[real_BT], whole_BTV[real_BT])


@pytest.mark.parametrize("differing", [False, True], ids=["alike", "packed and padded"])
@pytest.mark.parametrize("name", LAYERS)
def test_float32_at_ten_windows_differs_by_less_than_1e_5(name: str, differing: bool) -> None:
    torch.manual_seed(0)
    shape = {"layers": 3, "dim": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "feed_forward_dim": 48}
    model = Decoder(ModelConfig(**{**shape, **LAYERS[name]}), VOCABULARY).eval()  # type: ignore[arg-type]
    documents_BT = packed()
    documents_BT = torch.cat([documents_BT, documents_BT[:, -1:].expand(-1, 10 * WINDOW - LENGTH)], 1)
    tokens_BT, given_BT = tokens(4, 10 * WINDOW), documents_BT if differing else None
    with torch.no_grad():
        whole_BTV = model(tokens_BT, given_BT)
    real_BT = documents_BT != PADDING if differing else torch.ones_like(documents_BT, dtype=torch.bool)
    one_by_one = [[1]] if name in ("windows", "a full layer", "sinks", "all") else []
    for chunks in (*one_by_one, [WINDOW + 1], CHUNKS["mixed"]):
        assert_same(streamed(model, tokens_BT, chunks, given_BT)[real_BT], whole_BTV[real_BT])


def test_a_bfloat16_cache_keeps_exact_positions_and_does_not_depend_on_the_chunks() -> None:
    # Beyond 256 bfloat16 holds no odd position.
    model, tokens_BT = drawn(LAYERS["sinks"] | {"qk_norm": True}).double(), tokens(2, 400)
    documents_BT = torch.zeros_like(tokens_BT)
    documents_BT[0, :5] = PADDING

    def logits(chunks: list[int], dtype: torch.dtype) -> torch.Tensor:
        cache = model.new_cache(dtype=dtype)
        with torch.no_grad():
            given = [
                model(tokens_BT[:, place], documents_BT[:, place], cache=cache) for place in cut(400, chunks)
            ]
        assert cache.layers[0].key_BSKD is not None
        assert cache.layers[0].key_BSKD.dtype is dtype
        return torch.cat(given, 1)[:, 5:]

    with torch.no_grad():
        whole_BTV = model(tokens_BT, documents_BT)[:, 5:]
    narrow = [logits(chunks, torch.bfloat16) for chunks in ([400], [1], [20, 3])]
    for other in narrow[1:]:
        assert_same(other, narrow[0])
    error, last = (narrow[0] - whole_BTV).abs(), slice(-100, None)
    assert error.mean() < 0.03 * whole_BTV.std()
    assert error[:, last].mean() < 1.5 * error[:, :100].mean()


@pytest.mark.parametrize("length", [1, 5, 8, 11, 12, LENGTH])
@pytest.mark.parametrize("layers", ["windows", "a full layer", "sinks", "many sinks", "all"])
def test_a_cache_holds_the_bytes_of_the_formula(layers: str, length: int) -> None:
    model = drawn(LAYERS[layers])
    for documents_BT in (None, torch.zeros(2, length, dtype=torch.int64)):
        for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
            cache = model.new_cache(length, dtype)
            with torch.no_grad():
                for place in cut(length, [3, 1]):
                    documents = None if documents_BT is None else documents_BT[:, place]
                    model(tokens(2, length)[:, place], documents, cache=cache)
            expected = model_cost(model.config, VOCABULARY, length, size).kv_cache_bytes
            assert cache.bytes_held == 2 * expected


def test_windowed_layers_hold_the_same_bytes_from_the_first_chunk_on() -> None:
    model = drawn(LAYERS["many sinks"])
    cache, held = model.new_cache(), set()
    with torch.no_grad():
        for place in cut(LENGTH, [3, 1, 20]):
            model(tokens(1, LENGTH)[:, place], cache=cache)
            held.add(cache.bytes_held)
    assert held == {model_cost(model.config, VOCABULARY, LENGTH, 4).kv_cache_bytes}


def test_a_full_layer_without_capacity_grows_by_half() -> None:
    model = drawn({"window": None, "layers": 1})
    cache, held = model.new_cache(), []
    with torch.no_grad():
        for _ in range(200):
            model(tokens(1, 1), cache=cache)
            held.append(cache.bytes_held // (2 * 2 * 8 * 4))
    assert sorted(set(held)) == [64, 96, 144, 216]


@torch.no_grad()
def test_misuse_of_a_cache_is_said() -> None:
    model = drawn(LAYERS["a full layer"])
    row_1T = tokens(1, 4)
    cache = model.new_cache(capacity=5)
    model(row_1T, cache=cache)
    with pytest.raises(ValueError, match="6 tokens in a cache of capacity=5; make one of capacity=6 or more"):
        model(row_1T[:, :2], cache=cache)
    with pytest.raises(ValueError, match="2 rows, and the cache holds 1"):
        model(tokens(2, 1), cache=cache)
    with pytest.raises(ValueError, match="from the first chunk on"):
        model(row_1T[:, :1], torch.zeros(1, 1, dtype=torch.int64), cache=cache)
    with pytest.raises(ValueError, match="beside a cache"):
        model(row_1T, positions_BT=torch.arange(4)[None], cache=cache)
    cache = model.new_cache()
    model(row_1T, torch.full((1, 4), 3), cache=cache)
    with pytest.raises(ValueError, match="documents_BT decreases"):
        model(row_1T, torch.full((1, 4), 2), cache=cache)
    with pytest.raises(ValueError, match="capacity=0"):
        model.new_cache(0)
    with torch.enable_grad(), pytest.raises(ValueError, match="no gradients"):
        model(row_1T, cache=model.new_cache())
