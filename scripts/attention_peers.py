"""What others offer for causal windowed attention, each as one function of query, key and value.

A peer is a function from a `Problem` to an `Attend`. It raises `UnsupportedError` where it has no way to
compute the problem, and ImportError where its package is missing. All of them compute the same function, but
for those in `FULL`, which see all earlier tokens: the price of having no window.

Shapes: B batch, T tokens, S keys, H query heads, K key-value heads, D head dimension, C chunk, N chunks.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class UnsupportedError(Exception):
    """The peer cannot compute this problem."""


@dataclass(frozen=True)
class Problem:
    """One shape to time, and where; `documents` [B, T] numbers the packed documents of each row, if any."""

    name: str
    batch: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int
    device: torch.device
    dtype: torch.dtype
    documents: Tensor | None = None


def causal_attention(problem: Problem) -> Attend:
    """torch's own choice for full causal attention."""
    if problem.documents is not None:
        raise UnsupportedError("it has no documents")

    def attend(query_BTHD: Tensor, key_BTKD: Tensor, value_BTKD: Tensor) -> Tensor:
        return _scaled_dot_product(query_BTHD, key_BTKD, value_BTKD, is_causal=True)

    return attend


def cudnn_causal_attention(problem: Problem) -> Attend:
    """Full causal attention of cuDNN."""
    attend = causal_attention(problem)
    if problem.device.type != "cuda":
        raise UnsupportedError("it runs on CUDA only")

    def attend_in_cudnn(query_BTHD: Tensor, key_BTKD: Tensor, value_BTKD: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return attend(query_BTHD, key_BTKD, value_BTKD)

    return attend_in_cudnn


def chunked_attention(problem: Problem) -> Attend:
    """torch's attention over chunks of `window` queries, each with its own and the previous chunk's keys."""
    chunk = problem.window
    if problem.tokens % chunk:
        raise UnsupportedError(f"it takes tokens in multiples of the window {chunk}")
    position_T = torch.arange(problem.tokens, device=problem.device)[None]
    query_NC1 = rearrange(position_T, "1 (n c) -> n c 1", c=chunk)
    key_N1S = _with_previous(position_T[..., None], chunk, padding=-problem.tokens).mT
    distance_NCS = query_NC1 - key_N1S
    allowed_NCS = (distance_NCS >= 0) & (distance_NCS < problem.window)
    if problem.documents is None:
        allowed = allowed_NCS.repeat(problem.batch, 1, 1)[:, None]
    else:
        query_documents = rearrange(problem.documents, "b (n c) -> (b n) c 1", c=chunk)
        key_documents = _with_previous(problem.documents[..., None], chunk, padding=-1).mT
        allowed = (allowed_NCS.repeat(problem.batch, 1, 1) & (query_documents == key_documents))[:, None]

    def attend(query_BTHD: Tensor, key_BTKD: Tensor, value_BTKD: Tensor) -> Tensor:
        chunks = rearrange(query_BTHD, "b (n c) h d -> (b n) c h d", c=chunk)
        keys, values = (_with_previous(heads_BTKD, chunk) for heads_BTKD in (key_BTKD, value_BTKD))
        mixed = _scaled_dot_product(chunks, keys, values, attn_mask=allowed)
        return rearrange(mixed, "(b n) c h d -> b (n c) h d", b=len(query_BTHD))

    return attend


def varlen_attention(problem: Problem) -> Attend:
    """torch's `varlen_attn`, FlashAttention 2 over packed sequences with a window."""
    from torch.nn.attention.varlen import varlen_attn

    if problem.device.type != "cuda":
        raise UnsupportedError("it runs on CUDA only")
    offsets, longest = _offsets(problem)
    options: dict[str, Any] = {}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = True

    def attend(query_BTHD: Tensor, key_BTKD: Tensor, value_BTKD: Tensor) -> Tensor:
        mixed = varlen_attn(
            query_BTHD.flatten(0, 1),
            key_BTKD.flatten(0, 1),
            value_BTKD.flatten(0, 1),
            offsets,
            offsets,
            longest,
            longest,
            window_size=(problem.window - 1, 0),
            **options,
        )
        assert isinstance(mixed, Tensor)
        return mixed.view_as(query_BTHD)

    return attend


def flash_attention_4(problem: Problem) -> Attend:
    """The package flash-attn-4."""
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func  # type: ignore[import-not-found]

    if problem.device.type != "cuda":
        raise UnsupportedError("it runs on CUDA only")
    options: dict[str, Any] = {"causal": True, "window_size": (problem.window - 1, 0)}
    offsets, longest = _offsets(problem)

    def attend(query_BTHD: Tensor, key_BTKD: Tensor, value_BTKD: Tensor) -> Tensor:
        return _first(flash_attn_func(query_BTHD, key_BTKD, value_BTKD, **options))

    def attend_packed(query_BTHD: Tensor, key_BTKD: Tensor, value_BTKD: Tensor) -> Tensor:
        mixed = flash_attn_varlen_func(
            *(heads.flatten(0, 1) for heads in (query_BTHD, key_BTKD, value_BTKD)),
            cu_seqlens_q=offsets,
            cu_seqlens_k=offsets,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            **options,
        )
        return _first(mixed).view_as(query_BTHD)

    return attend if problem.documents is None else attend_packed


def flex_attention(problem: Problem) -> Attend:
    """torch's FlexAttention, compiled."""
    return _flex(problem)


def flex_attention_autotuned(problem: Problem) -> Attend:
    """torch's FlexAttention, compiled with autotuning of its tiles."""
    if problem.device.type != "cuda":
        raise UnsupportedError("it runs on CUDA only")
    return _flex(problem, mode="max-autotune-no-cudagraphs")


def flex_attention_flash(problem: Problem) -> Attend:
    """torch's FlexAttention through flash-attn-4."""
    import_module("flash_attn.cute")  # torch itself would miss it only when it compiles

    if problem.device.type != "cuda":
        raise UnsupportedError("it runs on CUDA only")
    return _flex(problem, options={"BACKEND": "FLASH"})


PEERS: dict[str, Callable[[Problem], Attend]] = {
    "flash-attn-4": flash_attention_4,
    "flex flash": flex_attention_flash,
    "flex autotuned": flex_attention_autotuned,
    "flex": flex_attention,
    "varlen_attn": varlen_attention,
    "chunked sdpa": chunked_attention,
    "causal sdpa": causal_attention,
    "causal cudnn": cudnn_causal_attention,
}
FULL = {"causal sdpa", "causal cudnn"}
LARGEST_MASK = 16384


def _scaled_dot_product(query_BTHD: Tensor, key_BSKD: Tensor, value_BSKD: Tensor, **options: Any) -> Tensor:
    mixed_BHTD = F.scaled_dot_product_attention(
        query_BTHD.transpose(1, 2),
        key_BSKD.transpose(1, 2),
        value_BSKD.transpose(1, 2),
        enable_gqa=query_BTHD.shape[2] != key_BSKD.shape[2],
        **options,
    )
    return mixed_BHTD.transpose(1, 2)


def _with_previous(tokens: Tensor, chunk: int, padding: float = 0.0) -> Tensor:
    """Each chunk behind the chunk before it, [(B N), 2 C, ...] from [B, T, ...]."""
    chunks = rearrange(tokens, "b (n c) ... -> b n c ...", c=chunk)
    before = torch.cat([torch.full_like(chunks[:, :1], padding), chunks[:, :-1]], 1)
    return torch.cat([before, chunks], 2).flatten(0, 1)


def _offsets(problem: Problem) -> tuple[Tensor, int]:
    """Where the documents of the flattened batch start and end (int32), and the longest one's length."""
    starts_BT = torch.zeros(problem.batch, problem.tokens, dtype=torch.bool, device=problem.device)
    starts_BT[:, 0] = True
    if problem.documents is not None:
        starts_BT[:, 1:] = problem.documents.diff(dim=1) != 0
    starts = starts_BT.flatten().nonzero()[:, 0]
    offsets = torch.cat([starts, starts.new_full((1,), starts_BT.numel())])
    return offsets.int(), int(offsets.diff().max())


def _flex(problem: Problem, mode: str | None = None, options: dict[str, Any] | None = None) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as attention

    documents_BT, window = problem.documents, problem.window

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        near = (query >= key) & (query - key < window)
        if documents_BT is None:
            return near
        return near & (documents_BT[batch, query] == documents_BT[batch, key])

    blocks = create_block_mask(
        visible,
        None if documents_BT is None else problem.batch,
        None,
        problem.tokens,
        problem.tokens,
        device=problem.device.type,
        # Otherwise it makes a T x T tensor of int64; compiling a window of 128 did not end in torch 2.11.
        _compile=problem.device.type == "cuda" and problem.tokens > LARGEST_MASK,
    )
    compiled: Any = torch.compile(attention, dynamic=False, mode=mode)

    def attend(query_BTHD: Tensor, key_BTKD: Tensor, value_BTKD: Tensor) -> Tensor:
        mixed_BHTD = compiled(
            *(heads.transpose(1, 2) for heads in (query_BTHD, key_BTKD, value_BTKD)),
            block_mask=blocks,
            enable_gqa=query_BTHD.shape[2] != key_BTKD.shape[2],
            kernel_options=options,
        )
        return _first(mixed_BHTD).transpose(1, 2)

    return attend


def _first(result: Any) -> Tensor:
    """The output of functions that may return more beside it."""
    output = result[0] if isinstance(result, tuple) else result
    assert isinstance(output, Tensor)
    return output
