"""What is computed and kept in inference mode, and used in training afterwards."""

import pytest
import torch
from torch import Tensor

from windowlm.attention.backends import flex
from windowlm.attention.joint_projection import lay_side_by_side
from windowlm.attention.layers import SlidingWindowAttention
from windowlm.attention.window import Visibility

TOKENS = 12


def documents() -> Tensor:
    return (torch.arange(TOKENS) >= 5).int()[None].repeat(2, 1)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("window", [4, None])
@pytest.mark.parametrize("options", [{}, {"kv_heads": 1}, {"sinks": 2}, {"logit_cap": 5.0}])
def test_inference_mode_computes_what_training_does(
    threads: int, window: int | None, options: dict[str, int | float]
) -> None:
    layer = SlidingWindowAttention(16, 2, 8, window, dropout=0.0, **options)
    hidden_BTD = torch.randn(2, TOKENS, 16)
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            inferred = layer(hidden_BTD)
        trained = layer(hidden_BTD.requires_grad_())
    finally:
        torch.set_num_threads(1)
    torch.testing.assert_close(inferred.clone(), trained)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [4, None])
@pytest.mark.parametrize("built_within", [False, True])
def test_a_visibility_of_inference_mode_serves_training(
    window: int | None, packed: bool, built_within: bool
) -> None:
    layer = SlidingWindowAttention(16, 2, 8, window, dropout=0.0)
    hidden_BTD = torch.randn(2, TOKENS, 16)
    with torch.inference_mode(built_within):
        visibility = Visibility.build(window=window, documents_BT=documents() if packed else None)
        visibility = visibility.prepare(2).to(torch.device("cpu"))
    with torch.inference_mode():
        layer(hidden_BTD, visibility=visibility)
    layer(hidden_BTD.requires_grad_(), visibility=visibility).sum().backward()
    assert hidden_BTD.grad is not None


def test_block_masks_of_inference_mode_are_not_kept_as_such() -> None:
    flex._plain.cache_clear()
    heads_BTHD = torch.empty(1, 300, 1, 16)
    with torch.inference_mode():
        blocks = flex.block_mask(Visibility.build(window=20), heads_BTHD, heads_BTHD)
    assert not blocks.kv_indices.is_inference()


@pytest.mark.parametrize("made_within", [False, True])
def test_weights_that_inference_mode_lays_side_by_side_can_be_trained(made_within: bool) -> None:
    with torch.inference_mode(made_within):
        layers = [torch.nn.Linear(6, outputs) for outputs in (3, 5)]
    kept = [layer.weight.clone() for layer in layers]
    with torch.inference_mode():
        weight_OD, _ = lay_side_by_side(layers)
    assert torch.equal(weight_OD, torch.cat(kept))
    assert not weight_OD.is_inference()
    if not made_within:
        optimizer = torch.optim.SGD([layer.weight for layer in layers], lr=1.0)
        layers[0](torch.randn(2, 6, requires_grad=True)).sum().backward()
        optimizer.step()
        assert not torch.equal(weight_OD[:3], kept[0])
        assert torch.equal(weight_OD[3:], kept[1])
