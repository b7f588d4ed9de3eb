import math

import torch
from torch import nn

from windowlm.model.config import ModelConfig
from windowlm.model.decoder import Decoder
from windowlm.model.initialization import initialize


def model(layers: int = 8, *, tied: bool = False, options: bool = False) -> Decoder:
    torch.manual_seed(0)
    config = ModelConfig(
        layers=layers,
        dim=256,
        heads=4,
        kv_heads=2,
        head_dim=64,
        feed_forward_dim=512,
        tied_embeddings=tied,
        learned_sinks=options,
        output_gate=options,
    )
    return Decoder(config, 1000)


def test_every_matrix_has_the_deviation_of_the_table() -> None:
    built = model()
    for name, module in built.named_modules():
        if isinstance(module, nn.Linear):
            kind = name.rpartition(".")[2]
            expected = {"head": 0.02}.get(kind, module.in_features**-0.5)
            if kind in ("output", "down"):
                expected /= math.sqrt(2 * 8)
            assert math.isclose(module.weight.std().item(), expected, rel_tol=0.03), name
    assert math.isclose(built.embedding.weight.std().item(), 0.02, rel_tol=0.03)


def test_the_residual_stream_does_not_grow_with_depth() -> None:
    shallow, deep = (
        model(layers).hidden.__self__
        for layers in (2, 16)  # type: ignore[attr-defined]
    )
    spread = []
    for built in (shallow, deep):
        inputs: list[torch.Tensor] = []
        built.final_norm.register_forward_pre_hook(lambda _, given, kept=inputs: kept.append(given[0]))
        with torch.no_grad():
            built(torch.randint(0, 1000, (2, 64)))
        spread.append(inputs[0].std().item())
    assert spread[1] < 1.5 * spread[0]


def test_gates_start_half_open_and_sinks_like_one_key() -> None:
    built = model(1, options=True)
    layer = built.blocks[0].attention  # type: ignore[union-attr]
    nn.init.ones_(layer.gate.weight)
    nn.init.ones_(layer.sink_logits)
    initialize(built, 1)
    assert not layer.gate.weight.any()
    assert not layer.sink_logits.any()


def test_values_and_their_embeddings_start_equally_wide() -> None:
    shape = ModelConfig(layers=3, dim=256, heads=4, kv_heads=2, head_dim=64, value_embeddings=1)
    built = Decoder(shape, 1000)
    assert math.isclose(built.value_embeddings[0].weight.std().item(), 1.0, rel_tol=0.03)  # type: ignore[union-attr, operator]
    shares = [block.attention.value_shares for block in built.blocks]  # type: ignore[union-attr]
    assert [share is None for share in shares] == [False, True, False]
    assert torch.allclose(shares[0] ** 2, torch.tensor(0.5))  # type: ignore[operator]


def test_value_tables_serve_the_first_and_the_last_layers_in_the_same_order() -> None:
    assert ModelConfig(layers=5, value_embeddings=2).layer_value_tables() == [0, 1, None, 0, 1]
    assert ModelConfig(layers=2).layer_value_tables() == [None, None]


def test_layers_that_start_at_zero_add_nothing_and_learn() -> None:
    torch.manual_seed(0)
    shape = ModelConfig(layers=2, dim=32, heads=2, kv_heads=1, head_dim=16, zero_output_init=True)
    built = Decoder(shape, 50)
    tokens_BT = torch.randint(0, 50, (2, 20))
    assert torch.equal(built.hidden(tokens_BT), built.final_norm(built.embedding(tokens_BT)))
    built(tokens_BT).square().sum().backward()
    for block in built.blocks:
        assert block.attention.output.weight.grad.any()  # type: ignore[union-attr, operator]
        assert block.feed_forward.down.weight.grad.any()  # type: ignore[union-attr, operator]


def test_the_embedding_residual_starts_as_the_plain_stream() -> None:
    shape = {"layers": 2, "dim": 32, "heads": 2, "kv_heads": 1, "head_dim": 16}
    tokens_BT = torch.randint(0, 50, (2, 20))
    outputs = []
    for on in (False, True):
        torch.manual_seed(0)
        built = Decoder(ModelConfig(**shape, embedding_residual=on), 50)  # type: ignore[arg-type]
        outputs.append(built.hidden(tokens_BT))
    shares = [block.residual_shares.tolist() for block in built.blocks]  # type: ignore[union-attr, operator]
    assert shares == [[1.0, 0.0], [1.0, 0.0]]
    assert torch.equal(*outputs)
