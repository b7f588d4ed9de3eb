"""Attention that goes on while its process ends, where Python's pools of threads take no more work."""

import textwrap
from pathlib import Path

import pytest

from tests.conftest import start_script

COMMON = """
import atexit, threading
import torch
from windowlm.attention.dispatch import attention
from windowlm.attention.window import Visibility

torch.set_num_threads(2)

def attend():
    torch.manual_seed(0)
    query, visibility = torch.randn(2, 400, 4, 16, requires_grad=True), Visibility.build(window=30)
    attention(query, query, query, visibility, backend="banded").sum().backward()
    return query.grad

def attend_and_say():
    assert torch.equal(attend(), BEFORE) if BEFORE is not None else attend().isfinite().all()
    print("attended")
"""
WAYS = {
    "a thread that outlives the main one": """
        def outlive():
            threading.main_thread().join()
            attend_and_say()
        threading.Thread(target=outlive).start()
    """,
    "a function called at exit": """
        atexit.register(attend_and_say)
    """,
}


@pytest.mark.parametrize("before", ["attend()", "None"])
@pytest.mark.parametrize("way", WAYS)
def test_attention_goes_on_while_the_process_ends(way: str, before: str, tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(f"{COMMON}\nBEFORE = {before}\n{textwrap.dedent(WAYS[way])}")
    done = start_script(str(script), cwd=tmp_path, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "attended\n", "")
