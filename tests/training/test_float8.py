import copy

import pytest
import torch

from windowlm.config import ConfigError, TrainConfig
from windowlm.model.config import ModelConfig
from windowlm.model.decoder import Decoder
from windowlm.training.compilation import hidden_states
from windowlm.training.float8 import check_float8, float8_view

SHAPE = ModelConfig(
    layers=2, dim=64, heads=4, kv_heads=2, head_dim=16, feed_forward_dim=96, window=8, output_gate=True
)


def model_and_tokens() -> tuple[Decoder, torch.Tensor]:
    torch.manual_seed(0)
    return Decoder(SHAPE, 50).to(torch.bfloat16), torch.randint(50, (2, 32))


def gradients(model: Decoder, hidden_BTD: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    hidden_BTD.backward(torch.randn(hidden_BTD.shape).to(hidden_BTD.dtype))
    return {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore")
def test_float8_trains_the_same_parameters_to_about_the_same_gradients() -> None:
    model, tokens_BT = model_and_tokens()
    before = copy.deepcopy(model.state_dict())
    plain_BTD = model.hidden(tokens_BT)
    wanted = gradients(model, plain_BTD)
    float8_BTD = hidden_states(model, compiled=False, float8=True)(
        tokens_BT, visibilities=model.visibilities()
    )
    got = gradients(model, float8_BTD)
    assert got.keys() == wanted.keys()
    difference = (float8_BTD - plain_BTD).norm() / plain_BTD.norm()
    assert 0.01 < difference < 0.2  # it did round, to three bits, and compute the same
    for name, gradient in got.items():
        assert (gradient - wanted[name]).norm() < 0.4 * wanted[name].norm(), name  # two bits
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert type(model.blocks[0].feed_forward.up) is torch.nn.Linear  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore")
def test_only_matrices_whose_sides_float8_products_can_take_are_replaced() -> None:
    model, _ = model_and_tokens()
    view = float8_view(model)
    kinds = {
        name: type(module).__name__ for name, module in view.named_modules() if hasattr(module, "weight")
    }
    assert kinds["blocks.0.attention.query"] == kinds["blocks.1.feed_forward.down"] == "Float8Linear"
    assert kinds["blocks.0.attention.gate"] == "Linear"  # one output a head
    assert kinds["head"] == "Head"
    assert all(mine is other for mine, other in zip(model.parameters(), view.parameters(), strict=True))


def test_float8_is_refused_where_it_cannot_run() -> None:
    with pytest.raises(ConfigError, match=r"compute capability 8\.9"):
        check_float8(TrainConfig(run_dir="run", precision="fp8"), torch.device("cpu"))
    check_float8(TrainConfig(run_dir="run", precision="bf16-true"), torch.device("cpu"))
