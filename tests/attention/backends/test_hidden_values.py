"""Hidden keys and values of any finite size change nothing, where their products overflow too."""

from typing import Any

import pytest
import torch

from windowlm.attention.dispatch import attention
from windowlm.attention.document_layout import PADDING
from windowlm.attention.window import Visibility

TOKENS, CHANGED = 300, 140
HUGE = 3e38
DOCUMENTS = {"documents_BT": (torch.arange(TOKENS) >= 100).int()[None]}
RING = {
    "positions_BT": torch.arange(TOKENS)[None],
    "key_positions_BS": torch.randperm(TOKENS, generator=torch.Generator().manual_seed(0))[None],
}
CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"window": None}, {}),
    ({"window": 3}, {}),
    ({"window": 200}, {}),
    ({"window": 20, "causal": False}, {}),
    ({"window": 20, "sinks": 3}, {}),
    ({"window": None, **DOCUMENTS}, {}),
    ({"window": 20, **DOCUMENTS}, {}),
    ({"window": 20, "sinks": 3, **DOCUMENTS}, {}),
    ({"window": 20, "sinks": 30, "causal": False, **DOCUMENTS}, {}),
    ({"window": None, **RING}, {}),
    ({"window": 20, **RING}, {}),
    ({"window": None}, {"logit_cap": 5.0}),
    ({"window": 20}, {"logit_cap": 5.0, "sink_logits_H": torch.zeros(4)}),
    ({"window": 20, "sinks": 3}, {"sink_logits_H": torch.zeros(4)}),
]


def check(given: dict[str, Any], options: dict[str, Any], dtype: torch.dtype, compiled: bool) -> None:
    torch.manual_seed(0)
    visibility = Visibility.build(**given)
    query, gradient = (torch.randn(1, TOKENS, 4, 16).to(dtype) for _ in range(2))
    key, value = (torch.randn(1, TOKENS, 2, 16).to(dtype) for _ in range(2))
    query.requires_grad_()
    call = torch.compile(attention, fullgraph=True, backend="aot_eager") if compiled else attention
    blind_T = ~visibility.mask(TOKENS, TOKENS, query.device)[0, :, CHANGED]
    assert 0 < blind_T.sum() < TOKENS

    def output_and_gradient(key: torch.Tensor, value: torch.Tensor) -> list[torch.Tensor]:
        mixed = call(query, key, value, visibility, backend="banded", **options)
        (of_query,) = torch.autograd.grad(mixed, query, gradient)
        return [mixed[:, blind_T], of_query[:, blind_T]]

    before = output_and_gradient(key, value)
    for huge in (HUGE, -HUGE):
        for name in ("key", "value"):
            changed = {"key": key.clone(), "value": value.clone()}
            changed[name][:, CHANGED] = huge
            output, of_query = output_and_gradient(**changed)
            assert torch.equal(output, before[0]), name
            torch.testing.assert_close(of_query, before[1], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("given", "options"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_hidden_changes_nothing(
    given: dict[str, Any], options: dict[str, Any], dtype: torch.dtype
) -> None:
    check(given, options, dtype, compiled=False)


@pytest.mark.parametrize(("given", "options"), [CASES[0], CASES[1], CASES[5], CASES[6], CASES[7], CASES[11]])
def test_what_is_hidden_changes_nothing_in_a_compiled_graph(
    given: dict[str, Any], options: dict[str, Any]
) -> None:
    torch.compiler.reset()
    check(given, options, torch.float32, compiled=True)


@pytest.mark.parametrize("huge", [3e38, -3e38])
def test_padding_inside_a_document_of_any_finite_size_changes_no_gradient(huge: float) -> None:
    torch.manual_seed(0)
    documents_BT = torch.zeros(1, 100, dtype=torch.int32)
    documents_BT[:, 60:70] = PADDING
    visibility = Visibility.build(window=20, documents_BT=documents_BT)
    query, key, value, gradient = (torch.randn(1, 100, heads, 16) for heads in (4, 2, 2, 4))

    def gradients(value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        numbers = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
        output = attention(*numbers, visibility, backend="banded")
        return torch.autograd.grad(output, numbers, gradient)

    changed = value.clone()
    changed[:, 60:70] = huge
    assert all(map(torch.equal, gradients(value), gradients(changed)))


@pytest.mark.parametrize("window", [4, 16, 200])
@pytest.mark.parametrize("causal", [True, False])
def test_a_document_that_overflows_takes_no_number_from_another(window: int, causal: bool) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(1, TOKENS, 2, 16) for _ in range(3)]
    for tensor, size in zip(tensors[1:], (-HUGE, HUGE), strict=True):
        tensor[:, :7] = size
    for tensor in tensors:
        tensor.requires_grad_()
    documents_BT = (torch.arange(TOKENS) >= 7).int()[None]
    visibility = Visibility.build(window=window, causal=causal, documents_BT=documents_BT)
    mixed = attention(*tensors, visibility, backend="banded")
    for gradient in torch.autograd.grad(mixed[:, 7:].sum(), tensors):
        assert gradient[:, 7:].isfinite().all()
