import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from windowlm.attention.window import Visibility
from windowlm.model.config import ModelConfig, NgramEmbeddingsConfig
from windowlm.model.cost import model_cost, pairs_by_position
from windowlm.model.decoder import Decoder


def config(**changes: object) -> ModelConfig:
    settings = {"layers": 3, "dim": 48, "heads": 4, "kv_heads": 2, "head_dim": 16, "feed_forward_dim": 80}
    return ModelConfig(**{**settings, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["tied_embeddings", "qk_norm", "qkv_bias", "learned_sinks", "output_gate"])
@pytest.mark.parametrize("value", [True, False])
def test_parameters_are_those_of_the_module(name: str, value: bool) -> None:
    shape = config(**{name: value})
    counted = sum(parameter.numel() for parameter in Decoder(shape, 300).parameters())
    assert model_cost(shape, 300, 64, 4).parameters == counted


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"output_gate": True, "learned_sinks": True},
        {"activation": "relu_squared"},
        {"value_embeddings": 1},
        {"short_convolution": 3},
        {"ngram_embeddings": NgramEmbeddingsConfig(buckets=10)},
        {"ngram_embeddings": NgramEmbeddingsConfig(buckets=10, dim=5)},
    ],
)
def test_flops_outside_attention_are_those_that_torch_counts(options: dict[str, object]) -> None:
    shape = config(window=1, backend="reference", **options)
    model = Decoder(shape, 300)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 64, dtype=torch.int64))
    products = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    assert products == 2 * model_cost(shape, 300, 64, 4).matmul_parameters * 64


def test_attention_counts_visible_pairs_only() -> None:
    cost = model_cost(config(window=4), 300, 10, 4)
    pairs = 1 + 2 + 3 + 4 * 7
    assert cost.attention_flops_per_token == pytest.approx(3 * 4 * 4 * 16 * pairs / 10)
    assert cost.flops_per_token == pytest.approx(
        6 * cost.matmul_parameters + 3 * cost.attention_flops_per_token
    )


def test_the_cache_of_a_windowed_layer_stops_growing() -> None:
    row = 2 * 2 * 16 * 4
    cost = model_cost(config(window=[8, None, 20]), 300, 100, 4)
    assert cost.kv_cache_bytes_per_token == 3 * row
    assert cost.kv_cache_bytes == row * (8 + 100 + 20)
    assert cost.receptive_field is None
    cost = model_cost(config(window=[8, None, 98], attention_sinks=4), 300, 100, 4)
    assert cost.kv_cache_bytes_per_token == 3 * row
    assert cost.kv_cache_bytes == row * (12 + 100 + 100)


def test_receptive_fields_add_up() -> None:
    assert model_cost(config(window=[8, 20]), 300, 100, 4).receptive_field == 1 + 7 + 19 + 7
    with_sinks = config(window=[8, 20], attention_sinks=3)
    assert model_cost(with_sinks, 300, 100, 4).receptive_field == 1 + 7 + 19 + 7 + 3


@pytest.mark.parametrize("windows", [[1], [3], [None], [3, None, 50], [17, 18, 20]])
@pytest.mark.parametrize("sinks", [0, 1, 3, 19, 30])
def test_pairs_are_those_of_the_mask(windows: list[int | None], sinks: int) -> None:
    shape = config(layers=len(windows), window=windows, attention_sinks=sinks)
    seen = sum(
        Visibility.build(window=window, sinks=sinks).mask(20, 20, torch.device("cpu")).long()
        for window in windows
    )
    assert pairs_by_position(shape, 20) == seen.sum(-1).flatten().tolist()
    flops = model_cost(shape, 300, 20, 4).attention_flops_per_token
    assert flops == pytest.approx(4 * 4 * 16 * int(seen.sum()) / 20)


def test_pairs_under_a_limit_are_those_of_smaller_windows() -> None:
    limited = pairs_by_position(config(window=[8, None, 20], attention_sinks=2), 40, window_limit=10)
    assert limited == pairs_by_position(config(window=[8, None, 10], attention_sinks=2), 40)
