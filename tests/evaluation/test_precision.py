"""Precision and mode of a scored model."""

import pytest
import torch
from torch import nn

from windowlm.errors import UserError
from windowlm.evaluation.precision import scoring


def small_model(dtype=torch.float32):
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).to(dtype)
    model.register_buffer("table", torch.ones(2, dtype=torch.float32))
    return model


@pytest.mark.parametrize(
    ("precision", "weights", "outputs"),
    [
        ("32-true", torch.float32, torch.float32),
        ("64-true", torch.float64, torch.float64),
        ("bf16-true", torch.bfloat16, torch.bfloat16),
        ("bf16-mixed", torch.float32, torch.bfloat16),
    ],
)
def test_weights_and_outputs_have_the_asked_dtype(precision, weights, outputs):
    for own in (torch.float32, torch.bfloat16):
        with scoring(small_model(own), precision) as scored:
            assert scored[0].weight.dtype is weights
            assert scored[0](torch.ones(1, 4, dtype=weights)).dtype is outputs


def test_the_model_comes_back_as_it_was():
    model = small_model(torch.bfloat16).train()
    before = model[0].weight.clone()
    with scoring(model, "32-true") as scored:
        assert not scored.training
        assert not scored(torch.ones(1, 4)).requires_grad
    assert model.training
    assert model[0].weight.dtype is torch.bfloat16
    assert torch.equal(model[0].weight, before)
    same = small_model().train()
    with scoring(same, "32-true") as scored:
        assert scored is same
        assert not same.training
    assert same.training


def test_tables_keep_their_dtype():
    with scoring(small_model(torch.float32), "bf16-true") as scored:
        assert scored.table.dtype is torch.float32


def test_what_a_model_keeps_from_scoring_can_be_trained_with():
    kept = []
    with scoring(small_model(), "32-true"):
        kept.append(torch.ones(4))
    weight = torch.ones(4, requires_grad=True)
    (weight * kept[0]).sum().backward()
    assert torch.equal(weight.grad, torch.ones(4))


def test_float32_products_are_not_tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with scoring(small_model(), "32-true"):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_float16_on_a_cpu_is_refused():
    with (
        pytest.raises(UserError, match=r"^evaluation\.precision=16-mixed: .*try evaluation\.precision="),
        scoring(small_model(), "16-mixed"),
    ):
        pass
