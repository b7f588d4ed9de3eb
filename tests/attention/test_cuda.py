"""What only a GPU can show: every backend in the layer, at each precision, compiled and not."""

import copy
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from tests.attention.cases import LAYOUTS, laid_out
from windowlm.attention.backends.capability import Request
from windowlm.attention.dispatch import MODULES, attention, capabilities, compute_capability
from windowlm.attention.document_layout import PADDING
from windowlm.attention.layers import SlidingWindowAttention
from windowlm.attention.window import Visibility

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

WINDOW, BATCH, TOKENS, DIM = 100, 2, 300, 256
PRECISIONS = ("bf16-true", "fp16-true", "bf16-autocast", "fp16-autocast")


@pytest.fixture(params=[name for name in MODULES if name not in ("reference", "banded")])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    name: str = request.param
    wanted = Request(
        device="cuda",
        compute_capability=compute_capability(torch.device("cuda")),
        dtype=torch.bfloat16,
        window=WINDOW,
        documents=True,
    )
    if (refusal := capabilities(name).refusal(wanted)) is not None:
        pytest.skip(refusal)
    yield name
    torch.compiler.reset()


def layers(backend: str, precision: str, **options: bool) -> tuple[SlidingWindowAttention, ...]:
    """The same weights at this precision with the backend, and in float32 with the reference."""
    torch.manual_seed(0)
    exact = SlidingWindowAttention(DIM, 4, 64, WINDOW, 0.0, kv_heads=2, backend="reference", **options).cuda()
    tried = copy.deepcopy(exact)
    tried.backend = backend
    if precision.endswith("true"):
        tried = tried.to(torch.bfloat16 if precision.startswith("bf16") else torch.float16)
    return tried, exact


def visibility_of_documents() -> Visibility:
    documents_BT = torch.zeros(BATCH, TOKENS, dtype=torch.int32)
    documents_BT[:, 120:] = 1
    documents_BT[0, 280:] = -1
    visibility = Visibility.build(window=WINDOW, documents_BT=documents_BT).prepare(BATCH)
    return visibility.pin_memory().to(torch.device("cuda"), non_blocking=True)


def output_and_gradients(
    layer: SlidingWindowAttention, precision: str, visibility: Visibility | None
) -> list[Tensor]:
    torch.manual_seed(1)
    hidden_BTD = torch.randn(BATCH, TOKENS, DIM, device="cuda").to(layer.query.weight.dtype).requires_grad_()
    gradient_BTD = torch.randn(BATCH, TOKENS, DIM, device="cuda")
    half = torch.bfloat16 if precision.startswith("bf16") else torch.float16
    with torch.autocast("cuda", half) if precision.endswith("autocast") else nullcontext():
        output_BTD = layer(hidden_BTD, visibility=visibility)
    inputs = [hidden_BTD, *layer.parameters()]
    gradients = torch.autograd.grad(output_BTD, inputs, gradient_BTD.to(output_BTD.dtype))
    return [tensor.float() for tensor in (output_BTD, *gradients)]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("packed", [False, True])
def test_the_layer_equals_float32_at_every_precision(
    backend: str, precision: str, packed: bool, compiled: bool
) -> None:
    tried, exact = layers(backend, precision, qk_norm=True, gate=True)
    visibility = visibility_of_documents() if packed else None
    wanted = output_and_gradients(exact, "32-true", visibility)
    if compiled:
        tried.compile(fullgraph=True)
    tolerance = 0.03 if precision.startswith("bf16") else 0.004
    for got, exactly in zip(output_and_gradients(tried, precision, visibility), wanted, strict=True):
        assert (got - exactly).norm() <= tolerance * exactly.norm()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("packed", [False, True])
def test_heads_that_lie_otherwise_are_read_in_a_graph_too(backend: str, packed: bool, layout: str) -> None:
    torch.manual_seed(0)
    visibility = visibility_of_documents() if packed else Visibility.build(window=WINDOW)
    query, key, value, gradient = (
        torch.randn(BATCH, TOKENS, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2, 4)
    )

    def mixed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention(query, key, value, visibility, backend=backend)

    found = []
    for call, laid in ((mixed, "contiguous"), (torch.compile(mixed, fullgraph=True), layout)):
        heads = [laid_out(tensor, laid).requires_grad_() for tensor in (query, key, value)]
        output = call(*heads)
        found.append([output, *torch.autograd.grad(output, heads, laid_out(gradient, laid))])
    for plain, compiled in zip(*found, strict=True):
        assert (compiled - plain).float().norm() <= 0.005 * plain.float().norm()


def test_a_layer_from_the_meta_device_computes_the_same(backend: str) -> None:
    tried, _ = layers(backend, "bf16-true")
    with torch.device("meta"):
        empty = SlidingWindowAttention(DIM, 4, 64, WINDOW, 0.0, kv_heads=2, backend=backend)
    filled = empty.to(torch.bfloat16).to_empty(device="cuda")
    filled.load_state_dict(tried.state_dict())
    got, wanted = (output_and_gradients(layer, "bf16-true", None)[0] for layer in (filled, tried))
    assert torch.equal(got, wanted)


def test_a_batch_of_prepared_documents_never_waits_for_the_device(backend: str) -> None:
    tried, _ = layers(backend, "bf16-true")
    output_and_gradients(tried, "bf16-true", visibility_of_documents())
    visibility = visibility_of_documents()
    hidden_BTD = torch.randn(BATCH, TOKENS, DIM, device="cuda", dtype=torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        tried(hidden_BTD, visibility=visibility).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("huge", [3e38, -3e38])
def test_a_hidden_value_of_any_finite_size_changes_nothing_in_the_band(huge: float) -> None:
    """Its product with the output's gradient overflows, and meets a weight of zero."""
    torch.manual_seed(0)
    visibility = Visibility.build(window=WINDOW)
    query, key, value, gradient = (
        torch.randn(BATCH, TOKENS, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2, 4)
    )
    query.requires_grad_()

    def of_queries_behind_the_first(value: Tensor) -> list[Tensor]:
        output = attention(query, key, value, visibility, backend="band")
        (query_gradient,) = torch.autograd.grad(output, query, gradient)
        return [output[:, WINDOW:], query_gradient[:, WINDOW:]]

    changed = value.clone()
    changed[:, 0] = huge
    pairs = zip(of_queries_behind_the_first(value), of_queries_behind_the_first(changed), strict=True)
    assert all(torch.equal(before, after) for before, after in pairs)


@pytest.mark.parametrize("huge", [3e38, -3e38])
@pytest.mark.parametrize("backend", ["band", "banded", "flex", "varlen"])
def test_a_hidden_key_and_value_of_any_finite_size_change_no_output(backend: str, huge: float) -> None:
    """Their product with a query overflows, and plus -inf it would be NaN."""
    torch.manual_seed(0)
    visibility = Visibility.build(window=WINDOW)
    query, key, value = (
        torch.randn(BATCH, TOKENS, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2)
    )
    before = attention(query, key, value, visibility, backend=backend)
    key[:, 0] = value[:, 0] = huge
    changed = attention(query, key, value, visibility, backend=backend)
    assert torch.equal(before[:, WINDOW:], changed[:, WINDOW:])


@pytest.mark.parametrize("huge", [3e38, -3e38])
def test_a_padded_value_of_any_finite_size_gives_its_key_a_gradient_of_zero_in_the_band(huge: float) -> None:
    torch.manual_seed(0)
    documents_BT = torch.zeros(BATCH, TOKENS, dtype=torch.int32, device="cuda")
    documents_BT[:, -16:] = PADDING
    visibility = Visibility.build(window=WINDOW, documents_BT=documents_BT)
    query, key, value, gradient = (
        torch.randn(BATCH, TOKENS, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2, 4)
    )
    value[:, -16:] = huge
    key.requires_grad_()
    value.requires_grad_()
    output = attention(query, key, value, visibility, backend="band")
    for found in torch.autograd.grad(output, (key, value), gradient):
        assert found.isfinite().all()
        assert not found[:, -16:].any()
