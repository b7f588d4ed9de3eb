"""Threads of a CPU for `banded`: each computes a share of the heads, or of the tokens of few heads.

The operations on a block are too short to share: each would wait for the slower thread.

Shapes: B batch, T queries, S keys, H query heads, K key-value heads, D head dimension.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Lock
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

# From here on a sequence has tokens enough to be shared.
DIVISIBLE = 256
_ONE_AT_A_TIME = Lock()
Result = TypeVar("Result")


class Share(NamedTuple):
    """What one thread computes: some heads of a row of the batch, or one of several parts of its tokens.

    Attributes:
        row: of the batch.
        kv_heads, heads: key-value heads, and the query heads that read them.
        part, parts: which part of the tokens, of as many; they are about the same work.
    """

    row: int
    kv_heads: slice
    heads: slice
    part: int = 0
    parts: int = 1


def shares_of(
    query_BTHD: Tensor, key_BSKD: Tensor, *, divisible: bool, most_heads: int | None = None
) -> list[Share]:
    """Shares for the threads that there are.

    Args:
        query_BTHD: queries.
        key_BSKD: keys.
        divisible: whether the tokens of a row may be shared where its heads are too few.
        most_heads: key-value heads of a share; None: as many as the threads leave.
    """
    batch, kv_heads = key_BSKD.shape[0], key_BSKD.shape[2]
    groups, threads = query_BTHD.shape[2] // kv_heads, torch.get_num_threads()

    def of_heads(heads: int, parts: int) -> list[Share]:
        return [
            Share(
                row,
                slice(first, min(first + heads, kv_heads)),
                slice(first * groups, min(first + heads, kv_heads) * groups),
                part,
                parts,
            )
            for row in range(batch)
            for first in range(0, kv_heads, heads)
            for part in range(parts)
        ]

    heads = -(-kv_heads // threads)
    uneven = kv_heads % heads or batch * kv_heads // heads % threads
    if uneven and divisible and query_BTHD.shape[1] >= DIVISIBLE:
        return of_heads(kv_heads if most_heads is None else min(kv_heads, most_heads), threads)
    return of_heads(heads if most_heads is None else min(heads, most_heads), 1)


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads that are kept, as a new one takes a millisecond; a forked process needs its own."""
    return ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))


def in_parallel(compute: Callable[[Share], Result], shares: Sequence[Share]) -> list[Result]:
    """The result of each share, in order.

    The number of threads is one for the process meanwhile, as matrix products know no other. A single share
    is too little to gain by more.
    """
    with _ONE_AT_A_TIME, torch.autocast("cpu", enabled=False):
        threads = torch.get_num_threads()
        # A thread knows nothing of the caller's modes, and writes into what was made under them.
        inference = torch.is_inference_mode_enabled()

        def alone(share: Share) -> Result:
            with torch.inference_mode(inference), torch.no_grad(), torch.autocast("cpu", enabled=False):
                return compute(share)

        torch.set_num_threads(1)
        try:
            if threads == 1 or len(shares) == 1:
                return [compute(share) for share in shares]
            return list(_pool(threads, os.getpid()).map(alone, shares))
        finally:
            torch.set_num_threads(threads)
