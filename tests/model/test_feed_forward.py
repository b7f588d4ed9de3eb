import torch

from windowlm.model.feed_forward import FeedForward


def test_relu_squared_has_no_gate_and_squares_what_is_positive() -> None:
    torch.manual_seed(0)
    layer = FeedForward(3, 7, "relu_squared").double()
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "up.weight": (7, 3),
        "down.weight": (3, 7),
    }
    hidden_BTD = torch.randn(2, 5, 3, dtype=torch.float64)
    for row_TD, output_TD in zip(hidden_BTD, layer(hidden_BTD), strict=True):
        for hidden_D, output_D in zip(row_TD, output_TD, strict=True):
            up = [max(0.0, (weight @ hidden_D).item()) ** 2 for weight in layer.up.weight]
            assert torch.allclose(layer.down.weight @ torch.tensor(up, dtype=torch.float64), output_D)


def test_swiglu_multiplies_by_a_gate() -> None:
    layer = FeedForward(3, 7).double()
    assert layer.gate is not None
    hidden_BTD = torch.randn(2, 5, 3, dtype=torch.float64)
    gated = hidden_BTD @ layer.gate.weight.T
    expected_BTD = (gated * gated.sigmoid() * (hidden_BTD @ layer.up.weight.T)) @ layer.down.weight.T
    assert torch.allclose(layer(hidden_BTD), expected_BTD)
