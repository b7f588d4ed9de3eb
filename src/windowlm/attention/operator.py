"""Kernels as operators of torch: whole to the compiler, and cheap for the host to launch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# One that is no longer referred to takes its operators along.
_LIBRARIES: list[torch.library.Library] = []


class Operator:
    """A function of tensors that torch.compile calls without looking inside.

    `torch.library.custom_op` does the same at about 40 microseconds a call, most of them for the gradient.
    `call` does the work and records no gradient; `differentiable` does.

    Args:
        name: unique in this process, such as `__name__` with a suffix after a dot.
        schema: arguments and results in torch's schema language, `(Tensor query, int window) -> Tensor`.
        compute: does the work.
        pretend: returns empty tensors of the results' shapes, for tracing.
    """

    def __init__(
        self, name: str, schema: str, compute: Callable[..., Any], pretend: Callable[..., Any]
    ) -> None:
        module, _, function = name.rpartition(".")
        namespace = module.replace(".", "_")
        library = torch.library.Library(namespace, "FRAGMENT")  # type: ignore[no-untyped-call]
        library.define(function + schema)  # type: ignore[no-untyped-call]
        library.impl(function, compute, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"{namespace}::{function}", pretend, lib=library)
        _LIBRARIES.append(library)
        self.call: Any = getattr(getattr(torch.ops, namespace), function).default


def empty_contiguous_gradients(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """What the gradients of an attention operator look like, in memory in the order of their dimensions."""
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
