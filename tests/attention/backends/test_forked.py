"""Processes that are forked after their parent computed attention with several threads."""

import os
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import run_script

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

COMMON = """
import os, signal, threading
import torch
from windowlm.attention.backends import banded_threads
from windowlm.attention.dispatch import attention
from windowlm.attention.window import Visibility

torch.set_num_threads(2)

def attend(window, **options):
    query, visibility = torch.randn(2, 400, 4, 16, requires_grad=True), Visibility.build(window=window)
    attention(query, query, query, visibility, backend="banded", **options).sum().backward()

WAYS = [lambda: attend(30), lambda: attend(300), lambda: attend(None), lambda: attend(30, logit_cap=5.0)]

def in_child(work):
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # ends it
        work()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.fixture
def run(tmp_path: Path) -> Callable[[str], None]:
    """Run a program in a process of its own, as pytest has threads and one process for many tests."""

    def in_process(program: str) -> None:
        script = tmp_path / "program.py"
        script.write_text(COMMON + textwrap.dedent(program))
        done = run_script(str(script), cwd=tmp_path, timeout=120)
        assert done.returncode == 0, done.stderr

    return in_process


@pytest.mark.parametrize("first", [0, 3])
def test_a_child_computes_after_its_parent_did(first: int, run: Callable[[str], None]) -> None:
    run(
        f"""
        WAYS[{first}]()
        def work():
            for way in WAYS:
                way()
            assert torch.get_num_threads() == 1
            torch.randn(1000, 1000) @ torch.randn(1000, 1000)
        in_child(work)
        assert torch.get_num_threads() == 2
        WAYS[{first}]()
        """
    )


def test_a_child_of_a_parent_that_used_no_threads_keeps_them(run: Callable[[str], None]) -> None:
    run(
        """
        def work():
            assert torch.get_num_threads() == 2
            for way in WAYS:
                way()
            in_child(WAYS[0])
        in_child(work)
        """
    )


def test_a_child_does_not_wait_for_what_a_thread_of_its_parent_holds(run: Callable[[str], None]) -> None:
    run(
        """
        WAYS[0]()
        held, forked = threading.Event(), threading.Event()
        def hold():
            with banded_threads._one_at_a_time:
                held.set()
                forked.wait()
        holder = threading.Thread(target=hold)
        holder.start()
        held.wait()
        in_child(WAYS[0])
        forked.set()
        holder.join()
        WAYS[0]()
        """
    )


def test_workers_of_a_data_loader_compute_attention(run: Callable[[str], None]) -> None:
    run(
        """
        WAYS[1]()
        class Set(torch.utils.data.Dataset):
            def __len__(self):
                return 4
            def __getitem__(self, number):
                for way in WAYS:
                    way()
                return number
        loader = torch.utils.data.DataLoader(Set(), num_workers=2, multiprocessing_context="fork", timeout=30)
        assert len(list(loader)) == 4
        """
    )
