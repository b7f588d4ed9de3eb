"""Runs of two processes by torchrun and by our launcher: one folder and W&B run each, and made again."""

import json
from pathlib import Path

import pytest

from tests.conftest import PROJECT, MakeOnce, run_script
from tests.training.runs import record
from windowlm.training.offline_wandb import history_differences

STEPS = 2
# Of `small_run`, which gives an absolute folder of text.
OF_THE_DATA = ("data.path", "data.cache_dir")


@pytest.fixture(scope="module")
def sweep(small_run: tuple[str, ...], documents: Path, made_once: MakeOnce) -> Path:
    """Two runs by torchrun itself, whose paths begin in the folder of the sweep."""

    def make(folder: Path) -> None:
        (folder / "texts").symlink_to(documents)
        words = [word for word in small_run if word.partition("=")[0] not in OF_THE_DATA]
        words += ["data.path=texts", "data.cache_dir=cache", f"trainer.max_steps={STEPS}"]
        words += ["trainer.device=cpu", "seed=0,1", "run_dir=sweep"]
        (folder / "torchrun.py").write_text("from torch.distributed.run import main\n\nmain()\n")
        launched = ("--standalone", "--nproc-per-node", "2", str(PROJECT / "train.py"))
        done = run_script(str(folder / "torchrun.py"), *launched, "-m", *words, cwd=folder)
        assert done.returncode == 0, done.stderr

    return made_once("torchrun", make) / "sweep"


def is_one_sweep_of_two_processes(folder: Path) -> None:
    """Each run has its folder, seed and W&B run, in which each step stands once."""
    assert sorted(path.name for path in folder.iterdir()) == ["0", "1", "multirun.yaml"]
    records = [record(folder / number) for number in "01"]
    assert [(one["status"], one["processes"]) for one in records] == [("finished", 2)] * 2
    assert len({one["wandb_id"] for one in records}) == 2
    for number in "01":
        assert json.loads((folder / number / "config.json").read_text())["seed"] == int(number)
        # That there is one offline run as well.
        assert history_differences(folder / number) == []


def test_a_sweep_under_torchrun_has_one_folder_and_one_wandb_run_for_each_run(sweep: Path) -> None:
    is_one_sweep_of_two_processes(sweep)
    # The second process has made no folder of its own.
    assert {path.name for path in sweep.parent.glob("[!.]*")} == {"cache", "sweep", "texts", "torchrun.py"}


def test_a_sweep_of_our_launcher_has_one_folder_and_one_wandb_run_for_each_run(
    small_run: tuple[str, ...], tmp_path: Path
) -> None:
    plain = (word for word in small_run if not word.startswith("data.batch_size="))
    words = ("-m", *plain, f"trainer.max_steps={STEPS}", "trainer.device=cpu", "trainer.devices=2")
    done = run_script("train.py", *words, "seed=0,1", "run_dir=sweep", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    is_one_sweep_of_two_processes(tmp_path / "sweep")
    for number in "01":
        settings = json.loads((tmp_path / "sweep" / number / "config.json").read_text())
        assert settings["data"]["batch_size"] == 2


def test_a_run_of_two_processes_is_reproduced_by_two_from_another_folder(sweep: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    done = run_script("scripts/reproduce.py", str(sweep / "0"), "--into", str(again), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "reproduced, equal bit for bit" in done.stdout
    made, found = record(sweep / "0"), record(again)
    for name in ("processes", "threads", "working_folder", "prepared_data"):
        assert found[name] == made[name]
    assert made["working_folder"] == str(sweep.parent)
    assert not made["processes_changed"]
