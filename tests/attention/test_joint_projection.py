import pytest
import torch

from windowlm.attention.joint_projection import FEW_TOKENS, project_jointly


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
