"""The commands to try after a run."""

import shlex
from pathlib import Path

import pytest

from windowlm.command_line import Invocation
from windowlm.config import TrainConfig
from windowlm.model.config import ModelConfig
from windowlm.training.closing_screen import next_commands
from windowlm.training.run_folder import RunFolder


def first_command(command: str, window: int | None = 512, sweep: bool = False) -> str:
    config = TrainConfig(run_dir="my runs/0", model=ModelConfig(window=window))
    folder = Path("my runs/0")
    invocation = Invocation(output_dir=folder, sweep_dir=folder.parent if sweep else None, command=command)
    return next_commands(config, RunFolder(folder), invocation)[0]


def test_the_first_keeps_the_settings_of_the_run() -> None:
    words = [
        "model=small",
        "data.path=it's a book.txt",
        "run_dir=my runs/0",
        "+model.window=512",
        "resume=auto",
    ]
    assert shlex.split(first_command(shlex.join(["python", "my clone/train.py", *words]))) == [
        "python",
        "train.py",
        "model=small",
        "data.path=it's a book.txt",
        "model.window=128",
    ]


@pytest.mark.parametrize(("window", "smaller"), [(512, 128), (2, 1), (None, 64)])
def test_the_first_has_a_smaller_window(window: int | None, smaller: int) -> None:
    assert first_command("python train.py", window) == f"python train.py model.window={smaller}"


def test_the_first_after_a_run_of_a_sweep_compares_its_runs() -> None:
    command = "python train.py -m model=small,base seed=0,1"
    assert first_command(command, sweep=True) == "python scripts/compare_runs.py 'my runs'"
