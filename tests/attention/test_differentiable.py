"""Derivatives of the operators of each backend: the first, and the error where more is asked."""

import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from windowlm.attention.backends import band, flash4
from windowlm.attention.dispatch import attention
from windowlm.attention.layers import SlidingWindowAttention
from windowlm.attention.window import Visibility

TOKENS = 12
REFUSED = re.escape("; reference can; try backend=reference")
WAYS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"window": 5}, {}),
    ({"window": None}, {}),
    ({"window": None, "causal": False}, {}),
    ({"window": None, "causal": False, "documents_BT": (torch.arange(TOKENS) // 7)[None]}, {}),
    ({"window": 9}, {}),
    ({"window": 5, "sinks": 2}, {}),
    ({"window": 5}, {"logit_cap": 3.0}),
    ({"window": 5}, {"sink_logits_H": torch.zeros(2, dtype=torch.float64)}),
    ({"window": 5, "documents_BT": (torch.arange(TOKENS) // 7)[None]}, {}),
]


def heads(count: int = 2, **options: Any) -> Tensor:
    return torch.randn(1, TOKENS, count, 4, dtype=torch.float64, **options).requires_grad_()


@pytest.fixture(params=WAYS)
def call(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    given, options = request.param
    visibility = Visibility.build(**given)

    def attend(query: Tensor, key: Tensor, value: Tensor, backend: str = "banded") -> Tensor:
        return attention(query, key, value, visibility, backend=backend, **options)

    return attend


def test_a_second_derivative_is_refused_where_it_is_asked_and_not_before(call: Callable[..., Tensor]) -> None:
    query, key, value = heads(), heads(), heads()
    first = torch.autograd.grad(call(query, key, value).sin().sum(), (query, key, value), create_graph=True)
    plain = torch.autograd.grad(call(query, key, value).sin().sum(), (query, key, value))
    for ours, expected in zip(first, plain, strict=True):
        torch.testing.assert_close(ours, expected)
    for gradient in first:
        with pytest.raises(ValueError, match="'banded' .* a second derivative was asked for" + REFUSED):
            gradient.sum().backward(retain_graph=True)


def test_the_reference_has_second_derivatives(call: Callable[..., Tensor]) -> None:
    tensors = heads(), heads(), heads()
    assert torch.autograd.gradgradcheck(
        lambda *given: call(*given, backend="reference"), tensors, fast_mode=True
    )


def test_forward_mode_is_refused_and_gives_no_zeros(call: Callable[..., Tensor]) -> None:
    query, key, value = (heads().detach() for _ in range(3))
    with pytest.raises(ValueError, match="a derivative in forward mode was asked for" + REFUSED):
        torch.func.jvp(call, (query, key, value), (query, key, value))


def test_dual_tensors_are_refused_and_give_no_zeros(call: Callable[..., Tensor]) -> None:
    query, key, value = (heads().detach() for _ in range(3))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(query, query)
        torch.compiler.reset()
        for attend in (call, torch.compile(call, fullgraph=True, backend="eager")):
            # A compiled graph tells it in an error of its own.
            with pytest.raises(Exception, match="a derivative in forward mode was asked for" + REFUSED):
                attend(dual, key, value)
        tangent = forward_ad.unpack_dual(call(dual, key, value, backend="reference")).tangent
    torch.testing.assert_close(
        tangent, torch.func.jvp(lambda each: call(each, key, value, "reference"), (query,), (query,))[1]
    )


def test_derivatives_of_torch_func_within_torch_compile_are_refused(call: Callable[..., Tensor]) -> None:
    query, key, value = (heads().detach() for _ in range(3))

    def forward_mode(query: Tensor, backend: str) -> Tensor:
        return torch.func.jvp(lambda each: call(each, key, value, backend), (query,), (query,))[1]

    def reverse_mode(query: Tensor, backend: str) -> Tensor:
        return torch.func.grad(lambda each: call(each, key, value, backend).sin().sum())(query)

    for derivative in (forward_mode, reverse_mode):
        torch.compiler.reset()
        compiled = torch.compile(derivative, fullgraph=True, backend="eager")
        with pytest.raises(Exception, match="was asked for" + REFUSED):
            compiled(query, "banded")
        torch.testing.assert_close(compiled(query, "reference"), derivative(query, "reference"))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_torch_func_differentiates_and_maps(call: Callable[..., Tensor]) -> None:
    query, key, value = (heads().detach() for _ in range(3))
    several = torch.stack([query, query + 1.0])

    def loss(query: Tensor, backend: str = "banded") -> Tensor:
        return call(query, key, value, backend=backend).sin().sum()

    for transform in (torch.func.grad(loss), torch.func.jacrev(lambda x: call(x, key, value))):
        assert transform(query).isfinite().all()
    torch.testing.assert_close(
        torch.func.vmap(torch.func.grad(loss))(several),
        torch.stack([torch.func.grad(loss)(each, "reference") for each in several]),
    )
    with pytest.raises(ValueError, match="asked for" + REFUSED):
        torch.func.hessian(loss)(query)


def test_a_compiled_graph_may_use_one_tensor_several_times(call: Callable[..., Tensor]) -> None:
    query = heads()
    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    results = [
        torch.autograd.grad(each(query, query, query).sin().sum(), query)[0] for each in (compiled, call)
    ]
    torch.testing.assert_close(*results)


def test_a_layer_names_the_way_out() -> None:
    layer = SlidingWindowAttention(8, 2, 4, 5, dropout=0.0)
    hidden_BTD = torch.randn(1, TOKENS, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(hidden_BTD).sum(), hidden_BTD, create_graph=True)
    with pytest.raises(ValueError, match="try backend=reference"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("backend", [band, flash4])
@pytest.mark.parametrize("packed", [False, True])
def test_backends_of_gpus_record_gradients_and_refuse_second_ones(backend: ModuleType, packed: bool) -> None:
    documents_BT = (torch.arange(TOKENS) // 7)[None].int() if packed else None
    visibility = Visibility.build(window=5, documents_BT=documents_BT).prepare(1).to(torch.device("meta"))
    query, key, value = (heads(count, device="meta") for count in (4, 2, 2))
    mixed = backend.attend(query, key, value, visibility, scale=0.5, dropout=0.0)
    gradients = torch.autograd.grad(mixed.sum(), (query, key, value), create_graph=True)
    assert [gradient.shape for gradient in gradients] == [query.shape, key.shape, value.shape]
    name = backend.__name__.rpartition(".")[2]
    with pytest.raises(ValueError, match=f"backend='{name}' computes first derivatives"):
        gradients[0].sum().backward()
