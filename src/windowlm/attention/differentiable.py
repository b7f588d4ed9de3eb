"""Attention operators with first derivatives, and one clear error where more is asked of them."""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from .operator import Operator


def differentiable(
    backend: str, attend: Operator, attend_backward: Operator, *, keeps_outputs: bool
) -> Callable[..., Tensor]:
    """A function of the arguments of `attend` whose gradient is `attend_backward`.

    It returns what `attend` returns first. torch.func.grad and torch.func.vmap know it.

    Args:
        backend: whose it is, for the error.
        attend: its first arguments are those with gradients.
        attend_backward: takes the gradient of the output, all arguments of `attend` and, with
            `keeps_outputs`, all its results; returns the gradients of its first arguments.
        keeps_outputs: whether the backward pass reads the results.

    Raises:
        ValueError: where the gradient is differentiated again, and where the function is differentiated in
            forward mode.
    """

    def refuse(asked: str) -> NoReturn:
        raise ValueError(
            f"backend={backend!r} computes first derivatives in reverse mode, {asked} was asked for; "
            "reference can; try backend=reference"
        )

    class Gradients(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*arguments: Any) -> Any:
            return attend_backward.call(*arguments)

        @staticmethod
        def setup_context(context: Any, inputs: tuple[Any, ...], output: Any) -> None:
            """Nothing is kept."""

        @staticmethod
        def backward(context: Any, *gradients: Any) -> Any:
            refuse("a second derivative")

        @staticmethod
        def jvp(context: Any, *tangents: Any) -> Any:
            refuse("a derivative of the gradient in forward mode")

    class Attention(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*arguments: Any) -> Any:
            return attend.call(*arguments)

        @staticmethod
        def setup_context(context: Any, inputs: tuple[Any, ...], output: Any) -> None:
            context.mark_non_differentiable(*_results(output)[1:])
            keep(context, inputs, output)

        @staticmethod
        def backward(context: Any, *of_results: Tensor) -> tuple[Any, ...]:
            further = torch.is_grad_enabled()
            return of_arguments(Gradients.apply if further else attend_backward.call, context, *of_results)

        @staticmethod
        def jvp(context: Any, *tangents: Any) -> Any:
            refuse("a derivative in forward mode")

    def keep(context: Any, inputs: tuple[Any, ...], output: Any) -> None:
        kept = [*inputs, *_results(output)] if keeps_outputs else inputs
        context.save_for_backward(*(each for each in kept if isinstance(each, Tensor)))
        context.others = [None if isinstance(each, Tensor) else (each,) for each in kept]
        context.arguments = len(inputs)

    def of_arguments(compute: Callable[..., Any], context: Any, *of_results: Tensor) -> tuple[Any, ...]:
        tensors = iter(context.saved_tensors)
        kept = [next(tensors) if other is None else other[0] for other in context.others]
        gradients: list[Tensor | None] = [None] * context.arguments
        for number, gradient in enumerate(compute(of_results[0], *kept)):
            if isinstance(kept[number], Tensor):
                gradients[number] = gradient
        return tuple(gradients)

    # torch.compile knows no function with a `jvp`, nor one that takes a tensor twice, but operators.
    recorded = Operator(f"{attend.name}_recorded", attend.schema, attend.compute, attend.pretend)
    torch.library.register_autograd(
        recorded.call,
        lambda context, *of_results: of_arguments(attend_backward.call, context, *of_results),
        setup_context=lambda ctx, inputs, output: keep(ctx, inputs, output),
    )
    apply: Callable[..., Any] = Attention.apply

    def attention(*arguments: Any) -> Tensor:
        compute = recorded.call if torch.compiler.is_compiling() else apply
        output: Tensor = _results(compute(*arguments))[0]
        return output

    return attention


def _results(output: Any) -> tuple[Any, ...]:
    return output if isinstance(output, tuple) else (output,)
