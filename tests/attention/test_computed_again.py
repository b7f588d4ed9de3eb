"""A compiled backward pass keeps the arguments alone, and gives the same gradients."""

import torch
from torch import Tensor

from windowlm.attention.computed_again import computed_again


def mixed(first: Tensor, second: Tensor) -> Tensor:
    return (first.sigmoid() * second).tanh() * second.cos()


def kept_and_gradients(compiled: bool) -> tuple[int, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(5, 7, generator=generator, requires_grad=True) for _ in range(2)]
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    def again(first: Tensor, second: Tensor) -> Tensor:
        return computed_again(mixed, first, second)

    torch.compiler.reset()
    function = torch.compile(again, fullgraph=True, backend="aot_eager") if compiled else mixed
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = function(*inputs)
    return len(kept), [value, *torch.autograd.grad(value.square().sum(), inputs)]


def test_arguments_alone_are_kept_and_gradients_are_the_same() -> None:
    kept, compiled = kept_and_gradients(compiled=True)
    _, plain = kept_and_gradients(compiled=False)
    assert kept == 2
    torch.testing.assert_close(compiled, plain)
