import pytest
import torch

from windowlm.attention.joint_projection import FEW_TOKENS, lay_side_by_side, project_jointly


@pytest.mark.parametrize("tokens", [1, FEW_TOKENS, FEW_TOKENS + 1, 2 * FEW_TOKENS])
@pytest.mark.parametrize("bias", [True, False])
def test_one_product_gives_what_each_layer_gives_with_and_without_gradients(tokens: int, bias: bool) -> None:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(6, outputs, bias=bias) for outputs in (3, 5, 2)]
    hidden_BTD = torch.randn(1, tokens, 6)
    apart = [layer(hidden_BTD) for layer in layers]
    torch.testing.assert_close(list(project_jointly(hidden_BTD, layers)), apart)
    with torch.no_grad():
        torch.testing.assert_close(list(project_jointly(hidden_BTD, layers)), apart)


@pytest.mark.parametrize("bias", [True, False])
def test_layers_side_by_side_in_memory_compute_the_same_and_stay_apart(bias: bool) -> None:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(6, outputs, bias=bias) for outputs in (3, 5, 2)]
    hidden_BTD = torch.randn(2, 3, 6)
    apart = [layer(hidden_BTD) for layer in layers]
    joint = lay_side_by_side(layers)
    weight_OD = joint[0]
    torch.testing.assert_close(list(project_jointly(hidden_BTD, layers, joint)), apart)
    torch.testing.assert_close([layer(hidden_BTD) for layer in layers], apart)
    with torch.no_grad():
        layers[1].weight.zero_()
    assert not weight_OD[3:8].any()
    assert weight_OD[:3].all()
    assert weight_OD[8:].all()
