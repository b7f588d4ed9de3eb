"""Head and loss in pieces, against all logits at once."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from windowlm.model.head import Head
from windowlm.training import linear_cross_entropy as module
from windowlm.training.linear_cross_entropy import cross_entropy_of_logits, head_loss, linear_cross_entropy

UNSCORED = -100


def draw(tokens: int, dtype: torch.dtype, unscored: float = 0.2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    hidden_ND = torch.randn(tokens, 24, generator=generator).to(dtype).requires_grad_()
    weight_VD = torch.randn(50, 24, generator=generator).to(dtype).requires_grad_()
    targets_N = torch.randint(50, (tokens,), generator=generator)
    targets_N[torch.rand(tokens, generator=generator) < unscored] = UNSCORED
    return hidden_ND, weight_VD, targets_N


def gradients(summed: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(summed * 0.37, tensors)


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 31])
@pytest.mark.parametrize("tokens_at_once", [1, 8, 100])
@pytest.mark.parametrize("logit_cap", [None, 3.0])
def test_pieces_give_the_loss_and_the_gradients_of_all_logits(
    tokens: int, tokens_at_once: int, logit_cap: float | None
) -> None:
    hidden_ND, weight_VD, targets_N = draw(tokens, torch.float64)
    options: dict[str, Any] = {"unscored": UNSCORED, "logit_cap": logit_cap}
    ours = linear_cross_entropy(hidden_ND, weight_VD, targets_N, **options, tokens_at_once=tokens_at_once)
    plain = cross_entropy_of_logits(hidden_ND, weight_VD, targets_N, **options)
    for got, wanted in zip(ours, plain, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    for got, wanted in zip(
        gradients(ours[0], hidden_ND, weight_VD), gradients(plain[0], hidden_ND, weight_VD), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    assert not ours[1].requires_grad


@pytest.mark.parametrize("tokens", [1, 7, 31])
@pytest.mark.parametrize("logit_cap", [None, 3.0])
def test_what_is_compiled_between_the_products_computes_the_same(
    monkeypatch: pytest.MonkeyPatch, tokens: int, logit_cap: float | None
) -> None:
    monkeypatch.setattr(module, "_compiled_pieces", lambda: (module._nats, module._fused_nats_and_gradient))
    hidden_ND, weight_VD, targets_N = draw(tokens, torch.float64)
    fused, plain = (
        linear_cross_entropy(
            hidden_ND,
            weight_VD,
            targets_N,
            unscored=UNSCORED,
            logit_cap=logit_cap,
            tokens_at_once=8,
            compiled=compiled,
        )
        for compiled in (True, False)
    )
    torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-12)
    for got, wanted in zip(
        gradients(fused[0], hidden_ND, weight_VD), gradients(plain[0], hidden_ND, weight_VD), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        summed, _ = linear_cross_entropy(
            hidden_ND, weight_VD, targets_N, unscored=UNSCORED, logit_cap=logit_cap, compiled=True
        )
    torch.testing.assert_close(summed, plain[0].detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("logit_cap", [None, 5.0])
def test_errors_are_at_most_twice_those_of_all_logits(dtype: torch.dtype, logit_cap: float | None) -> None:
    hidden_ND, weight_VD, targets_N = draw(300, dtype)
    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden_ND, weight_VD)]
    options: dict[str, Any] = {"unscored": UNSCORED, "logit_cap": logit_cap}
    exact = gradients(cross_entropy_of_logits(*wide, targets_N, **options)[0], *wide)
    plain = gradients(
        cross_entropy_of_logits(hidden_ND, weight_VD, targets_N, **options)[0], hidden_ND, weight_VD
    )
    ours = gradients(
        linear_cross_entropy(hidden_ND, weight_VD, targets_N, **options, tokens_at_once=64)[0],
        hidden_ND,
        weight_VD,
    )
    for got, usual, wanted in zip(ours, plain, exact, strict=True):
        assert got.dtype == dtype
        assert (got - wanted).norm() <= 2 * (usual - wanted).norm()


def test_under_autocast_products_are_rounded_and_gradients_keep_the_dtype_of_the_weights() -> None:
    hidden_ND, weight_VD, targets_N = draw(40, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours, nats_N = linear_cross_entropy(hidden_ND, weight_VD, targets_N, unscored=UNSCORED)
        plain, plain_nats_N = cross_entropy_of_logits(hidden_ND, weight_VD, targets_N, unscored=UNSCORED)
    torch.testing.assert_close(nats_N, plain_nats_N)
    for got, wanted in zip(
        gradients(ours, hidden_ND, weight_VD), gradients(plain, hidden_ND, weight_VD), strict=True
    ):
        assert got.dtype == torch.float32
        assert (got - wanted).norm() < 0.01 * wanted.norm()


def test_without_targets_there_is_no_loss_and_no_gradient() -> None:
    hidden_ND, weight_VD, targets_N = draw(10, torch.float32, unscored=1.1)
    summed, nats_N = linear_cross_entropy(hidden_ND, weight_VD, targets_N, unscored=UNSCORED)
    assert summed.item() == 0
    assert not nats_N.any()
    assert not any(gradient.any() for gradient in gradients(summed, hidden_ND, weight_VD))


def test_a_matrix_shared_with_the_embedding_gets_both_gradients() -> None:
    hidden_ND, weight_VD, targets_N = draw(20, torch.float64)
    ours, plain = (
        of_loss(
            hidden_ND.detach() + weight_VD[targets_N.clamp(min=0)], weight_VD, targets_N, unscored=UNSCORED
        )[0]
        for of_loss in (linear_cross_entropy, cross_entropy_of_logits)
    )
    torch.testing.assert_close(gradients(ours, weight_VD), gradients(plain, weight_VD))


def test_huge_logits_overflow_nothing() -> None:
    hidden_ND, weight_VD, targets_N = draw(10, torch.float32, unscored=0)
    summed, _ = linear_cross_entropy(hidden_ND * 1e4, weight_VD * 1e4, targets_N, unscored=UNSCORED)
    assert all(gradient.isfinite().all() for gradient in gradients(summed, hidden_ND, weight_VD))


def test_float16_takes_all_logits_unless_told() -> None:
    for kind, precision in (("auto", "16-mixed"), ("whole", "32-true")):
        assert head_loss(kind, precision, compiled=True) is cross_entropy_of_logits
    for kind, precision in (("auto", "bf16-true"), ("pieces", "32-true")):
        loss = head_loss(kind, precision, compiled=False)
        assert isinstance(loss, partial)
        assert loss.func is linear_cross_entropy


def test_a_loss_that_is_only_measured_computes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden_ND, weight_VD, targets_N = draw(20, torch.float32)
    _, wanted_N = linear_cross_entropy(hidden_ND, weight_VD, targets_N, unscored=UNSCORED)

    def refused(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(module, "_nats_and_gradient", refused)
    with torch.no_grad():
        _, nats_N = linear_cross_entropy(hidden_ND, weight_VD, targets_N, unscored=UNSCORED)
    torch.testing.assert_close(nats_N, wanted_N)
    with pytest.raises(AssertionError):
        linear_cross_entropy(hidden_ND, weight_VD, targets_N, unscored=UNSCORED)


def test_a_cap_is_that_of_the_head() -> None:
    hidden_ND, weight_VD, targets_N = draw(20, torch.float64, unscored=0)
    head = Head(24, 50, logit_cap=3.0).double()
    with torch.no_grad():
        head.weight.copy_(weight_VD)
        logits_NV = head(hidden_ND)
    assert 2.5 < logits_NV.abs().max() < 3
    wanted = torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="sum")
    ours, _ = linear_cross_entropy(hidden_ND, weight_VD, targets_N, unscored=UNSCORED, logit_cap=3.0)
    torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("target", [-1, 50])
def test_a_target_outside_of_the_vocabulary_is_an_error(target: int, with_gradients: bool) -> None:
    hidden_ND, weight_VD, targets_N = draw(7, torch.float32)
    targets_N[3] = target
    with torch.set_grad_enabled(with_gradients), pytest.raises(RuntimeError, match="index"):
        linear_cross_entropy(hidden_ND, weight_VD, targets_N, unscored=UNSCORED)
