"""Threads of a CPU for `banded`: each computes a share of the heads, or of the tokens where heads are uneven.

The operations on a block are too short to share: each would wait for the slower thread. The costly ones on a
whole tensor are shared here too: torch's own threads wait at full speed for milliseconds for their next
operation, and take the processors from these.

A process that is forked has none of its parent's threads, and those of torch hang in it once the parent has
used them. It therefore computes with one thread, as the workers of torch's DataLoader do.

Shapes: B batch, T queries, S keys, H query heads, K key-value heads, D head dimension.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from threading import Barrier, Lock
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

# From here on a sequence has tokens enough to be shared.
DIVISIBLE = 256
_one_at_a_time, _threads_used = Lock(), False
# From here on a tensor has numbers enough to be shared.
MANY = 2**20
Part = TypeVar("Part")
Result = TypeVar("Result")


def use_threads() -> int:
    """How many threads torch has, which from now on processes forked off this one do not use."""
    global _threads_used
    threads = torch.get_num_threads()
    _threads_used = _threads_used or threads > 1
    return threads


def _start_anew() -> None:
    """In a forked process: none of the parent's threads will let go of the lock, or answer."""
    global _one_at_a_time
    _one_at_a_time = Lock()
    _pool.cache_clear()
    if _threads_used:
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_start_anew)


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


def heads_are_even(key_BSKD: Tensor) -> bool:
    """Whether shares of whole heads are the same work for each thread."""
    batch, kv_heads, threads = key_BSKD.shape[0], key_BSKD.shape[2], torch.get_num_threads()
    return _are_even(batch, kv_heads, threads, _heads_of_a_share(kv_heads, threads))


def _are_even(batch: int, kv_heads: int, threads: int, heads: int) -> bool:
    return kv_heads % heads == 0 and batch * kv_heads // heads % threads == 0


def _heads_of_a_share(kv_heads: int, threads: int) -> int:
    return -(-kv_heads // threads)


def shares_of(
    query_BTHD: Tensor, key_BSKD: Tensor, *, divisible: bool, most_heads: int | None = None
) -> list[Share]:
    """Shares for the threads that there are.

    Args:
        query_BTHD: queries.
        key_BSKD: keys.
        divisible: whether the tokens of a row may be shared where its heads cannot be in equal shares.
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

    heads, parts = _heads_of_a_share(kv_heads, threads), 1
    if divisible and query_BTHD.shape[1] >= DIVISIBLE and not heads_are_even(key_BSKD):
        heads, parts = kv_heads, threads
    if most_heads is not None:
        most = min(heads, most_heads)
        # A little less than the most where that is as much for each thread.
        fewer = range(most, most // 2, -1)
        heads = next((few for few in fewer if _are_even(batch, kv_heads, threads, few)), most)
    return of_heads(heads, parts)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads that are kept, as a new one takes a millisecond.

    All have started: the number that each sets is also what new threads of the process begin with, and the
    caller restores that.
    """
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    all_started = Barrier(threads)
    try:
        for started in [pool.submit(all_started.wait) for _ in range(threads)]:
            started.result()
    except BaseException:
        # Those that wait for one that cannot start would wait at the end of the process too.
        all_started.abort()
        raise
    return pool


def in_parallel(compute: Callable[[Part], Result], shares: Sequence[Part]) -> list[Result]:
    """The result of each share, in order.

    The number of threads is one for the process meanwhile, as matrix products know no other. A single share
    is too little to gain by more.
    """
    with _one_at_a_time, torch.autocast("cpu", enabled=False):
        threads = use_threads()
        if threads == 1:
            # Perhaps of this thread alone, where the process has more.
            return [compute(share) for share in shares]
        # A thread knows nothing of the caller's modes, and writes into what was made under them.
        inference = torch.is_inference_mode_enabled()

        def alone(share: Part) -> Result:
            with torch.inference_mode(inference), torch.no_grad(), torch.autocast("cpu", enabled=False):
                return compute(share)

        torch.set_num_threads(1)
        try:
            if len(shares) == 1:
                return [compute(share) for share in shares]
            return _by_pool(alone, shares, threads)
        finally:
            torch.set_num_threads(threads)


def _by_pool(compute: Callable[[Part], Result], shares: Sequence[Part], threads: int) -> list[Result]:
    """The results by this thread and others, each of which takes a share when it is free.

    This one takes all where the process ends. A thread that waits takes a while to wake up.
    """
    results: dict[int, Result] = {}
    left = iter(range(len(shares)))

    def work() -> None:
        try:
            for number in left:
                results[number] = compute(shares[number])
        except BaseException:
            for _ in left:  # so that nobody begins another
                pass
            raise

    begun: list[Future[None]] = []
    try:
        pool = _pool(threads - 1)
        for _ in range(min(threads, len(shares)) - 1):
            begun.append(pool.submit(work))
    except RuntimeError as error:
        # Behind the end of the main thread a process begins no more threads, and pools take no more work.
        if "shutdown" not in str(error):
            raise
    work()
    for future in begun:
        future.result()
    return [results[number] for number in range(len(shares))]


def zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`torch.zeros` on the CPU."""
    room = torch.empty(shape, dtype=dtype, device="cpu")
    in_parallel(Tensor.zero_, _pieces(room))
    return room


def holds_nan(tensor: Tensor) -> bool:
    """Whether a number of the contiguous tensor is NaN."""

    def holds(piece: Tensor) -> bool:
        return bool(piece.sum().isnan())

    return any(in_parallel(holds, _pieces(tensor)))


def _pieces(tensor: Tensor) -> Sequence[Tensor]:
    return tensor.view(-1).chunk(torch.get_num_threads() if tensor.numel() >= MANY else 1)
