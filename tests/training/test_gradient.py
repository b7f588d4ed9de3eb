import pytest
import torch

from windowlm.training.gradient import gradient_norm, rescale_gradient


def gradients(dtype: torch.dtype) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    shapes = [(300, 70), (5,), (1000, 33)]
    return [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_norm_is_that_of_a_sum_in_float64(dtype: torch.dtype) -> None:
    drawn = gradients(dtype)
    expected = sum(gradient.double().square().sum() for gradient in drawn).sqrt()
    norm = gradient_norm(drawn)
    assert norm.dtype is torch.promote_types(dtype, torch.float32)
    assert norm.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gradient_is_rounded_once_when_it_is_rescaled(dtype: torch.dtype) -> None:
    scale = torch.tensor(1 / 3, dtype=torch.float64)
    drawn = gradients(dtype)
    expected = [gradient * scale.to(dtype) for gradient in drawn]
    rescale_gradient(drawn, scale)
    for gradient, value in zip(drawn, expected, strict=True):
        assert torch.equal(gradient, value)
