"""What threads of `banded` share evenly, do with whole tensors, and leave as it was."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from windowlm.attention.backends import banded_threads
from windowlm.attention.backends.banded_threads import (
    MANY,
    heads_are_even,
    holds_nan,
    in_parallel,
    shares_of,
    zeros,
)


@pytest.fixture(params=[1, 2, 3], autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    assert torch.get_num_threads() == request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("size", [0, 1, 7, MANY - 1, MANY, MANY + 1])
def test_a_single_nan_is_found_wherever_it_is(size: int) -> None:
    tensor = torch.zeros(size)
    assert not holds_nan(tensor)
    for place in {0, size // 2, size - 1} if size else ():
        tensor[place] = torch.nan
        assert holds_nan(tensor)
        tensor[place] = 0.0


def test_infinities_of_one_sign_are_none() -> None:
    assert not holds_nan(torch.tensor([[1.0, torch.inf], [torch.inf, -1.0]]))


@pytest.mark.parametrize("shape", [(0, 3), (2, 3, 4), (MANY // 4, 5)])
def test_zeros_are_zeros(shape: tuple[int, ...]) -> None:
    assert torch.equal(zeros(shape, torch.float64), torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("kv_heads", [1, 2, 3, 4, 5, 6, 7])
def test_heads_are_even_where_each_thread_gets_as_many(batch: int, kv_heads: int) -> None:
    threads = torch.get_num_threads()
    key_BSKD = torch.empty(batch, 8, kv_heads, 4)
    shares = shares_of(key_BSKD, key_BSKD, divisible=False)
    sizes = [share.kv_heads.stop - share.kv_heads.start for share in shares]
    assert heads_are_even(key_BSKD) == (len(set(sizes)) == 1 and len(sizes) % threads == 0)


@pytest.mark.parametrize("most_heads", [1, 2, 3, 5, 8, 9])
def test_shares_of_fewer_heads_are_as_large_as_one_another(most_heads: int, threads: int) -> None:
    key_BSKD = torch.empty(2, 4, 8 * threads, 1)
    shares = shares_of(key_BSKD, key_BSKD, divisible=False, most_heads=most_heads)
    sizes = [share.heads.stop - share.heads.start for share in shares]
    assert sum(sizes) == 2 * 8 * threads
    assert max(sizes) <= most_heads
    assert max(sizes) - min(sizes) <= 1


def test_threads_that_start_late_do_not_change_the_number(monkeypatch: pytest.MonkeyPatch) -> None:
    set_num_threads, main, started = torch.set_num_threads, threading.main_thread(), []

    def late(count: int) -> None:
        if threading.current_thread() is not main:
            started.append(count)
            time.sleep(0.1 * len(started))
        set_num_threads(count)

    monkeypatch.setattr(torch, "set_num_threads", late)
    threads = torch.get_num_threads()
    banded_threads._pool.cache_clear()
    try:
        assert in_parallel(str, range(2)) == ["0", "1"]
        assert started == [1] * (threads - 1)
        time.sleep(0.1 * threads)
        # A new thread begins with the number that was set last.
        with ThreadPoolExecutor(1) as other:
            assert other.submit(torch.get_num_threads).result() == threads
    finally:
        banded_threads._pool.cache_clear()


def test_a_thread_with_one_of_its_own_leaves_the_number_of_the_process(threads: int) -> None:
    with ThreadPoolExecutor(1) as other:
        # It begins during a call.
        assert in_parallel(lambda _: other.submit(torch.get_num_threads).result(), range(1)) == [1]
        assert other.submit(in_parallel, str, range(2)).result() == ["0", "1"]
        assert other.submit(torch.get_num_threads).result() == 1
    with ThreadPoolExecutor(1) as new:
        assert new.submit(torch.get_num_threads).result() == threads


def test_an_error_leaves_no_work_behind() -> None:
    done: list[int] = []

    def compute(share: int) -> None:
        if share == 0:
            raise MemoryError
        time.sleep(0.02)
        done.append(share)

    with pytest.raises(MemoryError):
        in_parallel(compute, range(50))
    in_parallel(str, range(2))
    assert len(done) < 25


def test_threads_that_cannot_start_keep_no_other_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, start, started = torch.get_num_threads(), threading.Thread.start, []

    def refuse_the_last(thread: threading.Thread) -> None:
        if len(started) == threads - 2:
            raise RuntimeError("can't start new thread")
        start(thread)
        started.append(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse_the_last)
    banded_threads._pool.cache_clear()
    if threads > 1:
        with pytest.raises(RuntimeError, match="can't start"):
            in_parallel(str, range(2))
    assert torch.get_num_threads() == threads
    monkeypatch.undo()
    assert in_parallel(str, range(2)) == ["0", "1"]
