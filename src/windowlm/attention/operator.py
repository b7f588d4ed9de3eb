"""Kernels as operators of torch: whole to the compiler, and cheap for the host to launch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Operator:
    """A function of tensors that torch.compile calls without looking inside.

    `torch.library.custom_op` does the same at about 40 microseconds a call, most of them for the gradient;
    here an autograd.Function around the operator records it.

    `call` does the work and records no gradient.

    Args:
        name: unique in this process, such as `__name__` with a suffix.
        schema: arguments and results in torch's schema language, `(Tensor query, int window) -> Tensor`.
        compute: does the work.
        pretend: returns empty tensors of the results' shapes, for tracing.
    """

    def __init__(
        self, name: str, schema: str, compute: Callable[..., Any], pretend: Callable[..., Any]
    ) -> None:
        namespace, function = name.replace(".", "_"), "call"
        self._library = torch.library.Library(namespace, "DEF")  # type: ignore[no-untyped-call]
        self._library.define(function + schema)  # type: ignore[no-untyped-call]
        self._library.impl(function, compute, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"{namespace}::{function}", pretend, lib=self._library)
        self.call: Callable[..., Any] = getattr(torch.ops, namespace).call.default


def empty_gradients(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What the gradients of an attention operator look like."""
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
