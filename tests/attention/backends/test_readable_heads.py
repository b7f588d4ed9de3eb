"""Heads are copied where kernels could not read them, and only there."""

from typing import Any

import pytest
import torch

from windowlm.attention.backends.readable_heads import aligned, with_aligned_gradient


def test_heads_are_copied_where_kernels_cannot_read_eight_numbers_at_once() -> None:
    wide = torch.randn(2, 5, 3, 80)
    for readable in (wide, wide[..., 8:72], wide[:, 1:], wide.transpose(1, 2), wide[:1, :1, :1, 16:]):
        assert aligned(readable) is readable
    odd = torch.randn(2, 5, 3, 12)
    assert aligned(odd) is odd
    for unreadable in (wide[..., 1:65], wide.flatten()[1:481].view(2, 1, 3, 80), wide[..., ::2], wide.mT):
        copied = aligned(unreadable)
        assert copied.is_contiguous()
        assert copied.data_ptr() % 32 == 0
        assert torch.equal(copied, unreadable)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_gradient_arrives_as_kernels_can_read_it(compiled: bool) -> None:
    arrived: list[torch.Tensor] = []

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, heads: torch.Tensor) -> torch.Tensor:
            return heads * 2

        @staticmethod
        def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
            arrived.append(gradient)
            return gradient * 2

    heads = torch.randn(2, 5, 3, 64, requires_grad=True)
    gradient = torch.randn(2, 5, 3, 67)[..., 1:65]
    call = with_aligned_gradient
    if compiled:
        call = torch.compile(with_aligned_gradient, backend="aot_eager", fullgraph=True)
    (got,) = torch.autograd.grad(call(Kernel.apply(heads)), heads, gradient)
    assert torch.equal(got, gradient * 2)
    assert arrived[0].is_contiguous()


def test_a_compiled_graph_copies_by_the_steps_alone() -> None:
    tried = torch.compile(aligned, backend="eager", fullgraph=True)
    wide = torch.randn(2, 5, 3, 80)
    assert tried(wide[..., 8:72]).stride() == wide.stride()
    for unreadable in (wide[..., ::2], wide.mT):
        copied = tried(unreadable)
        assert copied.is_contiguous()
        assert torch.equal(copied, unreadable)
