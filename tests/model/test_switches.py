"""What holds of the decoder whichever of its switches are on."""

import pytest
import torch
import torch.nn.functional as F

from windowlm.model.config import ModelConfig, NgramEmbeddingsConfig
from windowlm.model.cost import model_cost
from windowlm.model.decoder import Decoder
from windowlm.training.config import OptimizerConfig
from windowlm.training.optimizer import build_optimizer

VOCABULARY = 61
SHAPE: dict[str, object] = {
    "layers": 2,
    "dim": 32,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 8,
    "feed_forward_dim": 48,
    "window": [4, 3],
}
SWITCHES: dict[str, dict[str, object]] = {
    "plain": {},
    "ngrams": {"ngram_embeddings": NgramEmbeddingsConfig(orders=[2, 3, 5], buckets=4001)},
    "narrow ngrams": {"ngram_embeddings": NgramEmbeddingsConfig(orders=[4], buckets=50, dim=6)},
    "value embeddings": {"value_embeddings": 1},
    "relu squared": {"activation": "relu_squared"},
    "embedding residual": {"embedding_residual": True, "zero_output_init": True},
    "short convolution": {"short_convolution": 3},
    "final logit cap": {"final_logit_cap": 2.0},
    "biases": {"qkv_bias": True, "qk_norm_epsilon": 1e-2},
}
SWITCHES["all"] = {name: value for settings in SWITCHES.values() for name, value in settings.items()}
each_switch = pytest.mark.parametrize("switch", SWITCHES)


def drawn(switch: str, **changes: object) -> Decoder:
    """A model all of whose parameters are drawn, so that none hides behind its initial value."""
    torch.manual_seed(0)
    model = Decoder(ModelConfig(**{**SHAPE, **SWITCHES[switch], **changes}), VOCABULARY)  # type: ignore[arg-type]
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model.eval()


def tokens(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@each_switch
def test_every_parameter_is_counted(switch: str) -> None:
    model = drawn(switch)
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert model_cost(model.config, VOCABULARY, 64, 4).parameters == counted


@each_switch
def test_gradients_reach_every_parameter(switch: str) -> None:
    model = drawn(switch).train()
    F.cross_entropy(model(tokens(2, 30)).flatten(0, 1), tokens(2, 30, 2).flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        reached = parameter.grad.abs() > 0
        assert bool(reached.all() if parameter.numel() < 10 else reached.any()), name


@each_switch
def test_a_later_token_changes_nothing_earlier(switch: str) -> None:
    model = drawn(switch, window=[4, None])
    before_BT = tokens(2, 40)
    for place in (1, 20, 39):
        after_BT = before_BT.clone()
        after_BT[:, place] = (after_BT[:, place] + 1) % VOCABULARY
        with torch.no_grad():
            before_BTV, after_BTV = model(before_BT), model(after_BT)
        assert torch.equal(before_BTV[:, :place], after_BTV[:, :place])
        assert not torch.equal(before_BTV[:, place], after_BTV[:, place])


@each_switch
@pytest.mark.parametrize("lengths", [[1, 2, 3, 20], [11, 1, 1, 13]])
def test_packed_documents_are_what_each_is_alone(switch: str, lengths: list[int]) -> None:
    model = drawn(switch, window=[4, None]).double()
    padding = 3
    texts = tokens(1, sum(lengths))[0].split(lengths)
    packed_BT = torch.cat([*texts, tokens(1, padding, 3)[0]])[None]
    numbers = [*range(len(lengths)), -1]
    documents_BT = torch.tensor(numbers).repeat_interleave(torch.tensor([*lengths, padding]))[None]
    positions_BT = torch.cat([torch.arange(length) for length in [*lengths, padding]])[None]
    made = model.visibilities(documents_BT, positions_BT)
    alone_TV = torch.cat([model(text_T[None])[0] for text_T in texts])
    for packed_BTV in (
        model(packed_BT, documents_BT),
        model(packed_BT, documents_BT, positions_BT),
        model(packed_BT, visibilities=made),
    ):
        # Rotations are rounded to float32, elsewhere than those of other positions.
        assert torch.allclose(packed_BTV[0, :-padding], alone_TV, rtol=1e-4, atol=1e-4)


@each_switch
def test_other_documents_and_padding_change_no_bit(switch: str) -> None:
    model = drawn(switch, window=None)
    lengths = [4, 9, 5, 2]
    documents_BT = torch.tensor([-1, 0, 1, -1]).repeat_interleave(torch.tensor(lengths))[None]
    one_BT, two_BT = tokens(1, 20), tokens(1, 20, 2)
    two_BT[documents_BT == 1] = one_BT[documents_BT == 1]
    with torch.no_grad():
        one_BTV, two_BTV = model(one_BT, documents_BT), model(two_BT, documents_BT)
    assert torch.equal(one_BTV[documents_BT == 1], two_BTV[documents_BT == 1])
    assert not torch.equal(one_BTV[documents_BT == 0], two_BTV[documents_BT == 0])


@each_switch
def test_a_token_reaches_exactly_the_receptive_field(switch: str) -> None:
    model = drawn(switch).double()
    reach = model_cost(model.config, VOCABULARY, 64, 4).receptive_field
    assert reach is not None
    before_BT = tokens(1, reach + 3)
    for distance in range(reach + 3):
        after_BT = before_BT.clone()
        after_BT[0, -1 - distance] = (after_BT[0, -1 - distance] + 1) % VOCABULARY
        with torch.no_grad():
            changed = (model(before_BT) - model(after_BT))[0, -1].abs().max() > 1e-13
        assert bool(changed) is (distance < reach), distance


@each_switch
def test_rows_of_one_token_and_of_a_few_are_read(switch: str) -> None:
    model = drawn(switch, window=None).double()
    whole_BTV = model(tokens(1, 6))
    for length in range(1, 6):
        assert torch.allclose(model(tokens(1, 6)[:, :length]), whole_BTV[:, :length])


@each_switch
@pytest.mark.parametrize("mixed", [True, False])
def test_bfloat16_is_near_float32(switch: str, mixed: bool) -> None:
    model = drawn(switch)
    exact_BTV = model(tokens(1, 30))
    if not mixed:
        model = model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        rounded_BTV = model(tokens(1, 30))
    rounded_BTV.float().sum().backward()
    assert rounded_BTV.dtype is torch.bfloat16
    assert (rounded_BTV.float() - exact_BTV).norm() < 0.15 * exact_BTV.norm()


@each_switch
def test_a_block_compiles_into_one_graph(switch: str) -> None:
    model = drawn(switch, layers=2, window=3, backend="reference")
    visibilities = model.visibilities(torch.tensor([[0] * 12 + [1] * 8]))
    expected_BTD = model.hidden(tokens(1, 20), visibilities=visibilities)
    torch._dynamo.reset()
    model.blocks[1].compile(fullgraph=True, backend="eager")
    assert torch.allclose(model.hidden(tokens(1, 20), visibilities=visibilities), expected_BTD, atol=1e-5)


@pytest.mark.parametrize("packed", [True, False])
def test_the_whole_model_compiles_into_one_graph(packed: bool) -> None:
    model = drawn("all", backend="reference")
    documents_BT = torch.tensor([[0] * 12 + [1] * 8]) if packed else None
    expected_BTD = model.hidden(tokens(1, 20), documents_BT)
    visibilities = model.visibilities(documents_BT)
    torch._dynamo.reset()
    compiled = torch.compile(model.hidden, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(tokens(1, 20), visibilities=visibilities), expected_BTD, atol=1e-5)


@each_switch
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_each_parameter_is_trained_once_and_only_matrices_of_the_blocks_by_muon(
    switch: str, kind: str
) -> None:
    model = drawn(switch)
    optimizer = build_optimizer(model, OptimizerConfig(kind=kind, weight_decay=0.3), fused=False)  # type: ignore[arg-type]
    trained = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(trained) == sorted(map(id, model.parameters()))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == {id(p): 0.3 if p.ndim == 2 else 0.0 for p in model.parameters()}
    if kind == "muon":
        names = {id(p): name for name, p in model.named_parameters()}
        by_muon = {names[id(p)] for p in optimizer.param_groups[0]["params"]}
        assert by_muon == {
            name
            for name, p in model.named_parameters()
            if p.ndim == 2 and name.startswith("blocks.") and "attention.gate" not in name
        }
