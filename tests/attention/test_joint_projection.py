import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.utils import prune

from windowlm.attention.joint_projection import FEW_TOKENS, lay_side_by_side, project_jointly
from windowlm.attention.layers import SlidingWindowAttention
from windowlm.model.feed_forward import FeedForward


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


def test_layers_side_by_side_in_memory_are_trained_all_the_same() -> None:
    layers = [torch.nn.Linear(6, outputs) for outputs in (3, 5)]
    joint = lay_side_by_side(layers)
    torch.cat(project_jointly(torch.randn(2, 3, 6), layers, joint), -1).sum().backward()
    assert all(weight.grad is not None for layer in layers for weight in layer.parameters())


def test_weights_that_lie_elsewhere_by_now_are_multiplied_all_the_same() -> None:
    hidden_BTD = torch.randn(2, 3, 6)
    layers = [torch.nn.Linear(6, outputs) for outputs in (3, 5)]
    joint = lay_side_by_side(layers)

    def changed(change: Callable[[torch.nn.ModuleList], Any]) -> None:
        others = copy.deepcopy(torch.nn.ModuleList(layers))
        change(others)
        own: list[Any] = [*others]
        given = hidden_BTD.to(own[0].weight.dtype)
        with torch.no_grad():
            found = project_jointly(given, own, joint)
            torch.testing.assert_close(list(found), [layer(given) for layer in own])

    with torch.no_grad():
        changed(lambda others: others[0].weight.add_(1))
    changed(
        lambda others: others.load_state_dict({k: v + 1 for k, v in others.state_dict().items()}, assign=True)
    )
    changed(lambda others: others.bfloat16())
    changed(lambda others: others[1].register_forward_hook(lambda layer, given, output: output + 1))
    with torch.no_grad():
        layers[0].weight.add_(1)
        found = project_jointly(hidden_BTD, layers, joint)
        torch.testing.assert_close(list(found), [layer(hidden_BTD) for layer in layers])
    layers[1].bias = torch.nn.Parameter(torch.ones(5))
    with torch.no_grad():
        torch.testing.assert_close(project_jointly(hidden_BTD, layers, joint)[1], layers[1](hidden_BTD))


def test_hooks_of_a_layer_are_called() -> None:
    layers, called = [torch.nn.Linear(6, outputs, bias=False) for outputs in (3, 5)], []

    def remember(layer: torch.nn.Module, *_: Any) -> None:
        called.append(layer)

    for register in ("forward_pre", "forward", "full_backward_pre", "full_backward"):
        handle = getattr(layers[1], f"register_{register}_hook")(remember)
        hidden_BTD = torch.randn(2, 3, 6, requires_grad=True)
        torch.cat(project_jointly(hidden_BTD, layers), -1).sum().backward()
        handle.remove()
        assert called.pop() is layers[1]
        assert not called


def test_a_pruned_layer_is_trained() -> None:
    layers = [torch.nn.Linear(6, outputs, bias=False) for outputs in (3, 5)]
    prune.random_unstructured(layers[0], "weight", 0.5)
    for _ in range(2):
        torch.cat(project_jointly(torch.randn(2, 3, 6), layers), -1).sum().backward()
        with torch.no_grad():
            layers[0].weight_orig += 1
    hidden_BTD = torch.randn(2, 3, 6)
    torch.testing.assert_close(project_jointly(hidden_BTD, layers)[0], layers[0](hidden_BTD))


def test_copies_and_casts_of_a_layer_that_joined_its_weights_are_their_own() -> None:
    hidden_BTD = torch.randn(1, 5, 16)
    for layer in (SlidingWindowAttention(16, 2, 8, 4, dropout=0.0), FeedForward(16, 24)):
        layer.join_projections()
        copied, pickled = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
        for other in (copied, pickled):
            with torch.no_grad():
                for weight in other.parameters():
                    weight.mul_(-1.5)
            expected = copy.deepcopy(other)(hidden_BTD).detach()
            torch.compiler.reset()
            with torch.no_grad():
                torch.testing.assert_close(other(hidden_BTD), expected)
                compiled = torch.compile(other, fullgraph=True, backend="eager")
                torch.testing.assert_close(compiled(hidden_BTD), expected)
        with torch.no_grad():
            assert copied.bfloat16()(hidden_BTD.bfloat16()).isfinite().all()
            assert layer.double()(hidden_BTD.double()).isfinite().all()
