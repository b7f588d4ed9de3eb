"""The command ``python scripts/show_attention.py``."""

from pathlib import Path

import pytest

from tests.conftest import PROJECT, run_script
from windowlm.command_line import Command, main
from windowlm.config import ShowAttentionConfig


def test_the_mask_is_drawn_in_the_terminal_and_as_png(tmp_path: Path) -> None:
    target = tmp_path / "a mask, [drawn]=1.png"
    settings = ("window=4", "sequence_length=7", "documents=[5,2]", f"output_file={target}")
    done = run_script("scripts/show_attention.py", *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "A 4 · 1 1 1 1 · · 4" in done.stdout.splitlines()
    assert done.stdout.splitlines()[-1] == f"written to {target}"
    assert target.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("window=0", "show_attention.py window=4"),
        ("window=true", "window=true: allowed is a whole number or a list or null"),
        ("documents=[5,8]", "show_attention.py 'documents=[5,8]' sequence_length=13"),
        ("documents=[5,7,0]", "show_attention.py 'documents=[6,6]'"),
        ("windw=3", "show_attention.py window=3"),
        ("keys=5.5", "keys=5.5: allowed is a whole number or null"),
        ("output_file=mask.jpg", "show_attention.py output_file=attention.png"),
        ("output_file=", "output_file=: a name that ends in .png"),
    ],
)
def test_a_mistake_ends_with_status_2_and_a_mended_command(
    word: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = Command(name="show_attention", config_type=ShowAttentionConfig, task=lambda *_: 0)
    script = PROJECT / "scripts" / "show_attention.py"
    assert main(command, script, PROJECT / "conf", [word]) == 2
    assert message in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    done = run_script("scripts/show_attention.py", f"output_file={tmp_path}/no/a.png", cwd=tmp_path)
    assert done.returncode == 2
    assert "a name in a folder that can be written is allowed" in done.stderr
    assert not done.stdout  # known before anything is drawn
    assert "Traceback" not in done.stderr
