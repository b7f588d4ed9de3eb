"""Functions run by several processes of this machine that reach one another over gloo."""

import faulthandler
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from tests.forked_processes import forking_context, leave_unsynced

LOOPBACK = "127.0.0.1"


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind((LOOPBACK, 0))
        port: int = listening.getsockname()[1]
        return port


def run_in_processes(count: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(rank, *arguments)` returns in each of so many processes."""
    context = forking_context()
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        processes = multiprocessing.start_processes(
            _begin,
            (count, free_port(), results, Path(folder), work, arguments),
            nprocs=count,
            join=False,
            start_method=context.get_start_method(),
        )
        # What is large is sent only while it is read.
        found: dict[int, Any] = {}
        try:
            while not processes.join(timeout=0.1):
                found |= _received(results)
        except Exception:
            # The first to fail is not the first that is heard of: the others lose their connection to it.
            for path in sorted(Path(folder).iterdir()):
                print(path.name, path.read_text(), sep="\n", file=sys.stderr)
            raise
    found |= _received(results)
    return [found[rank] for rank in range(count)]


def _received(results: Any) -> dict[int, Any]:
    received = {}
    while not results.empty():
        rank, result = results.get()
        received[rank] = result
    return received


def _begin(
    rank: int,
    count: int,
    port: int,
    results: Any,
    folder: Path,
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    with (folder / f"process {rank}").open("w") as errors:
        os.dup2(errors.fileno(), 2)
    faulthandler.enable()
    torch.set_num_threads(1)
    leave_unsynced()
    address = f"tcp://{LOOPBACK}:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=count)
    try:
        results.put((rank, work(rank, *arguments)))
        dist.barrier()
    except Exception:
        traceback.print_exc()
        raise
    finally:
        dist.destroy_process_group()
