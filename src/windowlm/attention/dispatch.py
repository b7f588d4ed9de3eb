"""One attention function over all backends: checks the call, chooses who computes it, and says so once.

Shapes: B batch, T queries, S keys, H query heads, K key-value heads, D head dimension.
"""

import logging
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends import band, banded, flash4, flex, reference, varlen
from .backends.capability import Capabilities, Request
from .config import BACKENDS, shown
from .dense_tensor import check_dense
from .window import Visibility

log = logging.getLogger(__name__)

MODULES: dict[str, ModuleType] = {
    "band": band,
    "flash4": flash4,
    "varlen": varlen,
    "flex": flex,
    "banded": banded,
    "reference": reference,
}
COMPUTED = frozenset[torch.dtype]().union(*(module.CAPABILITIES.dtypes for module in MODULES.values()))
# Up to this window our tiles waste less than those of flash-attn-4, which hold 128 keys.
SMALL_WINDOW, SMALL_WINDOW_UNGROUPED = 256, 128
LEAST_FLOAT32, LARGEST_FLOAT32 = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


class Choice(NamedTuple):
    """The backend of a call and why it serves it."""

    name: str
    reason: str


def attention(
    query_BTHD: Tensor,
    key_BSKD: Tensor,
    value_BSKD: Tensor,
    visibility: Visibility,
    *,
    backend: str = "auto",
    dropout: float = 0.0,
    scale: float | None = None,
    sink_logits_H: Tensor | None = None,
    logit_cap: float | None = None,
) -> Tensor:
    """Softmax attention of each query over the keys that `visibility` shows it.

    Query head h reads key-value head `h // (H // K)`; keys and values are not repeated in memory. A query
    that sees nothing gets zeros.

    Args:
        query_BTHD: [B, T, H, D], floating point.
        key_BSKD: [B, S, K, D] of the same dtype and device; without positions of their own in `visibility`
            the queries are the last T of the S keys.
        value_BSKD: like `key_BSKD`.
        visibility: window, documents, padding and positions.
        backend: a name of `config.BACKENDS`; "auto" takes the fastest that supports the call.
        dropout: probability of dropping an attention weight.
        scale: factor on the scores, above 0, default `D ** -0.5`.
        sink_logits_H: [H], the score of one more key without a value, which joins each softmax's
            denominator (learned sinks, as in gpt-oss).
        logit_cap: scores s become `cap * tanh(s / cap)` before the softmax (as in Gemma 2); None for not.

    Returns:
        [B, T, H, D] in the dtype of the query.

    Raises:
        ValueError: where shapes, dtypes, devices or settings do not fit, or the named backend cannot
            honour the call; and where a second derivative or one in forward mode is asked of another
            backend of ours than the reference.
    """
    _check_tensors(query_BTHD, key_BSKD, value_BSKD, visibility)
    check_dropout(dropout)
    scale = query_BTHD.shape[-1] ** -0.5 if scale is None else scale
    if not _positive_in_float32(scale):
        raise ValueError(
            f"scale={shown(scale)}: a number above 0 that float32 can hold is allowed "
            "(for a negative one, negate the query); try scale=None"
        )
    check_logit_cap(logit_cap)
    if sink_logits_H is not None:
        _check_sink_logits(sink_logits_H, query_BTHD)
    scored = [query_BTHD, key_BSKD, value_BSKD, *([] if sink_logits_H is None else [sink_logits_H])]
    request = Request(
        device=query_BTHD.device.type,
        compute_capability=compute_capability(query_BTHD.device),
        dtype=query_BTHD.dtype,
        head_dim=query_BTHD.shape[-1],
        groups=query_BTHD.shape[2] // key_BSKD.shape[2],
        window=visibility.window,
        causal=visibility.causal,
        sinks=visibility.sinks,
        documents=visibility.documents is not None,
        gaps=visibility.documents is not None and (visibility.layout is None or visibility.layout.gaps),
        gaps_known=visibility.layout is not None,
        separate_keys=visibility.separate_keys,
        more_keys=not visibility.separate_keys and key_BSKD.shape[1] > query_BTHD.shape[1],
        dropout=dropout,
        sink_logits=sink_logits_H is not None,
        logit_cap=logit_cap is not None,
        gradients=torch.is_grad_enabled() and any(tensor.requires_grad for tensor in scored),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    choice = choose_backend(backend, request)
    _report(choice.name, choice.reason, request.device)
    # Only the backends that declare them take these.
    options: dict[str, Any] = {}
    if sink_logits_H is not None:
        options["sink_logits"] = sink_logits_H
    if logit_cap is not None:
        options["logit_cap"] = logit_cap
    output_BTHD: Tensor = MODULES[choice.name].attend(
        query_BTHD,
        key_BSKD,
        value_BSKD,
        visibility,
        scale=scale,
        dropout=dropout,
        **options,
    )
    return output_BTHD


def choose_backend(backend: str, request: Request) -> Choice:
    """Name the backend that serves the request, and the reason in words for a log or a plan.

    Raises:
        ValueError: for an unknown name, or one that cannot honour the request, with the reason and the
            backends that can.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: {', '.join(BACKENDS)} are allowed; try backend=auto")
    order = fastest_first(request.window, request.groups)
    refusals = {name: capabilities(name).refusal(request) for name in order}
    able = [name for name in order if refusals[name] is None]
    if not able:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
        raise ValueError(f"backend={backend!r}: no backend can serve this call ({reasons})")
    if backend == "auto":
        passed_over = [
            name for name in order[: order.index(able[0])] if capabilities(name).runs_on(request.device)
        ]
        reason = "".join(f"; not {name}: {refusals[name]}" for name in passed_over)
        return Choice(able[0], f"fastest that supports the call ({capabilities(able[0]).purpose}){reason}")
    if refusals[backend] is not None:
        raise ValueError(
            f"backend={backend!r} cannot serve this call: {refusals[backend]}; "
            f"{', '.join(able)} can; try backend={able[0]}"
        )
    return Choice(backend, "asked for by name")


def fastest_first(window: int | None, groups: int) -> list[str]:
    """All backends in the order in which `auto` asks them, as measured on an H200, an H100 and CPUs.

    `flex` is ahead of `varlen` at one shape, as in training; compiled for any, it is often behind.
    """
    small = window is not None and window <= (SMALL_WINDOW if groups > 1 else SMALL_WINDOW_UNGROUPED)
    ours, flash = ("band", "flash4") if small else ("flash4", "band")
    return [ours, flash, "flex", "varlen", "banded", "reference"]


def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """The CUDA device's compute capability; None for other devices."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.minor


def capabilities(name: str) -> Capabilities:
    """What the backend declares to support."""
    declared: Capabilities = MODULES[name].CAPABILITIES
    return declared


# The compiler calls it while it traces, and keeps nothing of it in the graph.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _report(name: str, reason: str, device: str) -> None:
    _report_once(name, reason, device)


@cache
def _report_once(name: str, reason: str, device: str) -> None:
    slow = device == "cuda" and name in ("banded", "reference")
    log.log(
        logging.WARNING if slow else logging.INFO, "attention on %s: backend %s, %s", device, name, reason
    )


def check_dropout(dropout: object) -> None:
    """Raise ValueError unless it is a probability below 1."""
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0.0 <= dropout < 1.0:
        raise ValueError(
            f"dropout={dropout!r}: a probability from 0 up to but not including 1 is allowed; try dropout=0.1"
        )


def check_logit_cap(logit_cap: object) -> None:
    """Raise ValueError unless the cap is a number above 0 that float32 can hold, or None."""
    if logit_cap is not None and not _positive_in_float32(logit_cap):
        raise ValueError(
            f"logit_cap={shown(logit_cap)}: a number above 0 that float32 can hold, or None, is allowed; "
            "try logit_cap=50"
        )


def _positive_in_float32(number: object) -> bool:
    """Whether kernels, which take it in float32, read neither zero nor infinity."""
    if isinstance(number, bool) or not isinstance(number, int | float):
        return False
    return LEAST_FLOAT32 <= number <= LARGEST_FLOAT32


def check_visibility(visibility: object) -> None:
    """Raise ValueError unless it is a `Visibility`."""
    if not isinstance(visibility, Visibility):
        raise ValueError(
            f"visibility is a {type(visibility).__name__}: what Visibility.build returns is allowed"
        )


def _check_sink_logits(sink_logits_H: Tensor, query_BTHD: Tensor) -> None:
    check_dense("sink_logits_H", sink_logits_H)
    if sink_logits_H.shape != query_BTHD.shape[2:3] or not sink_logits_H.is_floating_point():
        raise ValueError(
            f"sink_logits_H has shape {tuple(sink_logits_H.shape)} and dtype {sink_logits_H.dtype}: "
            f"one floating-point number for each of the {query_BTHD.shape[2]} query heads is allowed"
        )
    if sink_logits_H.device != query_BTHD.device:
        raise ValueError(
            f"sink_logits_H is on {sink_logits_H.device}, query on {query_BTHD.device}: give both one device"
        )


def _check_tensors(query_BTHD: Tensor, key_BSKD: Tensor, value_BSKD: Tensor, visibility: Visibility) -> None:
    named = {"query": query_BTHD, "key": key_BSKD, "value": value_BSKD}
    for name, tensor in named.items():
        check_dense(name, tensor)
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}: "
                "four dimensions [batch, tokens, heads, head dimension] are allowed"
            )
        if tensor.dtype not in COMPUTED:
            allowed = ", ".join(sorted(map(str, COMPUTED)))
            raise ValueError(f"{name} has dtype {tensor.dtype}: {allowed} are allowed")
        if tensor.dtype != query_BTHD.dtype or tensor.device != query_BTHD.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, "
                f"query {query_BTHD.dtype} on {query_BTHD.device}: give all three one dtype and device"
            )
        if 0 in tensor.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: sizes from 1 on are allowed")
    batch, _, heads, head_dim = query_BTHD.shape
    if key_BSKD.shape != value_BSKD.shape:
        raise ValueError(
            f"key has shape {tuple(key_BSKD.shape)}, value {tuple(value_BSKD.shape)}: give equal shapes"
        )
    if key_BSKD.shape[0] != batch or key_BSKD.shape[3] != head_dim:
        raise ValueError(
            f"query has shape {tuple(query_BTHD.shape)}, key {tuple(key_BSKD.shape)}: "
            "give one batch size and one head dimension"
        )
    if heads % key_BSKD.shape[2]:
        raise ValueError(
            f"{heads} query heads over {key_BSKD.shape[2]} key-value heads: give a divisor of {heads}"
        )
    check_visibility(visibility)
    visibility.check_call(batch, query_BTHD.shape[1], key_BSKD.shape[1], query_BTHD.device)
