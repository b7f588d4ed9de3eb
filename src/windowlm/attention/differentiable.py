"""Attention operators with first derivatives, and one clear error where more is asked of them."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import forward_ad

from .operator import Operator


class Computation(NamedTuple):
    """What an operator does, and what returns empty tensors like its results, for tracing."""

    compute: Callable[..., Any]
    pretend: Callable[..., Any]


def differentiable(
    backend: str,
    module: str,
    arguments: str,
    forward: Computation,
    backward: Computation,
    *,
    keeps_outputs: bool,
    gradients: int = 3,
) -> Callable[..., Tensor]:
    """A function of the arguments whose value is computed by `forward` and whose gradients by `backward`.

    torch.func.grad and torch.func.vmap know it, the former outside torch.compile. Its operators are `attend`,
    `attend_backward` and, where torch.compile records it, `attend_recorded`.

    Args:
        backend: whose it is, for the error.
        module: `__name__` of the caller, unique among all that are made differentiable.
        arguments: in torch's schema language; the first have gradients.
        forward: takes them; returns the output or, with `keeps_outputs`, output and normalizer.
        backward: takes the gradient of the output, the arguments and, with `keeps_outputs`, all results;
            returns the gradients of the first arguments.
        keeps_outputs: whether there is a normalizer, and the backward pass reads the results.
        gradients: how many `backward` returns.

    Raises:
        ValueError: where the gradient is differentiated again, where the function is differentiated in
            forward mode, and where torch.compile records a derivative of torch.func.
    """
    results = "(Tensor, Tensor)" if keeps_outputs else "Tensor"
    read = f"{arguments}, Tensor output, Tensor normalizer" if keeps_outputs else arguments
    of_first = ", ".join(["Tensor"] * gradients)
    schema = f"({arguments}) -> {results}"
    attend = Operator(f"{module}.attend", schema, *forward)
    attend_backward = Operator(
        f"{module}.attend_backward", f"(Tensor gradient, {read}) -> ({of_first})", *backward
    )

    refuse = partial(_refuse, backend)

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
        of_all: list[Tensor | None] = [None] * context.arguments
        for number, gradient in enumerate(compute(of_results[0], *kept)):
            if isinstance(kept[number], Tensor):
                of_all[number] = gradient
        return tuple(of_all)

    # torch.compile knows no function with a `jvp`, nor one that takes a tensor twice, but operators.
    recorded = Operator(f"{module}.attend_recorded", schema, *forward)
    torch.library.register_autograd(
        recorded.call,
        lambda context, *of_results: of_arguments(attend_backward.call, context, *of_results),
        setup_context=lambda ctx, inputs, output: keep(ctx, inputs, output),
    )
    apply: Callable[..., Any] = Attention.apply

    def attention(*arguments: Any) -> Tensor:
        _check_derivative(backend, arguments)
        compute = recorded.call if torch.compiler.is_compiling() else apply
        output: Tensor = _results(compute(*arguments))[0]
        return output

    return attention


def first_derivatives_only(backend: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The same tensors, for a function of torch's that has first derivatives in reverse mode alone.

    Args:
        backend: whose it is, for the error.
        tensors: what the function reads.

    Raises:
        ValueError: as `differentiable`; within torch.compile torch raises for a second derivative.
    """
    _check_derivative(backend, tensors)
    if torch.compiler.is_compiling():
        return tensors
    passed: tuple[Tensor, ...] = _FirstDerivatives.apply(backend, *tensors)  # type: ignore[no-untyped-call]
    return passed


class _FirstDerivatives(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(backend: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def setup_context(context: Any, inputs: tuple[Any, ...], output: Any) -> None:
        context.backend = inputs[0]

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            gradients = _SecondDerivatives.apply(context.backend, *gradients)  # type: ignore[no-untyped-call]
        return None, *gradients

    @staticmethod
    def jvp(context: Any, *tangents: Any) -> Any:
        _refuse(context.backend, "a derivative in forward mode")


class _SecondDerivatives(_FirstDerivatives):
    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Any:
        _refuse(context.backend, "a second derivative")


def _check_derivative(backend: str, arguments: tuple[Any, ...]) -> None:
    if _forward_mode(arguments):
        # An operator would pass tangents over, and one that writes into a tensor fail in words of torch.
        _refuse(backend, "a derivative in forward mode")
    if torch.compiler.is_compiling() and _in_derivative():
        _refuse(backend, "a derivative of torch.func within torch.compile")


def _refuse(backend: str, asked: str) -> NoReturn:
    raise ValueError(
        f"backend={backend!r} computes first derivatives in reverse mode, {asked} was asked for; "
        "reference can; try backend=reference"
    )


def _results(output: Any) -> tuple[Any, ...]:
    return output if isinstance(output, tuple) else (output,)


def _forward_mode(arguments: tuple[Any, ...]) -> bool:
    """Whether one of them carries a tangent, or may: those of a graph's inputs are not seen in it."""
    if forward_ad._current_level < 0:
        return False
    return torch.compiler.is_compiling() or any(
        forward_ad.unpack_dual(each).tangent is not None  # type: ignore[no-untyped-call]
        for each in arguments
        if isinstance(each, Tensor)
    )


# torch.compile knows the transforms while it traces, and not in the graph.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _in_derivative() -> bool:
    """Whether a transform of torch.func other than vmap is at work."""
    return any(each.key() != TransformType.Vmap for each in get_interpreter_stack() or [])
