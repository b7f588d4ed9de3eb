"""A sweep whose runs are jobs: each has its folder, its processes and its W&B run in one group."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.conftest import SMALL_RUN, run_script, write_documents
from tests.training.runs import record

pytest.importorskip("hydra_plugins.hydra_submitit_launcher")


@pytest.mark.parametrize(
    ("launcher", "processes", "seeds"), [("submitit_local", 1, [0, 1]), ("jobs_local", 2, [3])]
)
def test_each_run_of_a_sweep_is_a_job_with_its_own_folder_processes_and_wandb_run(
    small_run: tuple[str, ...], launcher: str, processes: int, seeds: list[int], tmp_path: Path
) -> None:
    folder = tmp_path / "sweep"
    done = run_script(
        "train.py",
        "-m",
        *small_run,
        f"seed={','.join(map(str, seeds))}",
        "trainer.max_steps=2",
        "trainer.device=cpu",
        f"trainer.devices={processes}",
        f"hydra/launcher={launcher}",
        f"run_dir={folder}",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    count = len(seeds)
    said = f"run_dir={folder}: all {count} runs have finished; logs are in .submitit there"
    assert done.stdout.splitlines()[-1] == said
    settings = OmegaConf.load(folder / "multirun.yaml").hydra.launcher
    # Without a number submitit would hide all GPUs.
    assert settings.tasks_per_node == settings.gpus_per_node == processes
    runs = [folder / str(number) for number in range(len(seeds))]
    assert [record(run)["status"] for run in runs] == ["finished"] * len(runs)
    assert [record(run)["processes"] for run in runs] == [processes] * len(runs)
    assert [json.loads((run / "config.json").read_text())["seed"] for run in runs] == seeds
    assert len({record(run)["wandb_id"] for run in runs}) == len(runs)
    for run in runs:
        (offline,) = run.glob("wandb/offline-run-*/run-*.wandb")
        # The group is the sweep's name.
        assert b"sweep" in offline.read_bytes()
    logs = [path.name for path in (folder / ".submitit").rglob("*_log.out")]
    assert len({name.split("_")[0] for name in logs}) == len(runs)
    assert len(logs) == len(runs) * processes


def test_a_job_that_is_lost_ends_the_command_with_one_message(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    words = ("trainer.max_steps=2", "trainer.device=cpu", "trainer.devices=2", "hydra/launcher=jobs_local")
    write_documents(tmp_path / "text")
    texts = ("seed=0", "data.path=nothing.txt,text")
    done = run_script("train.py", "-m", *SMALL_RUN, *words, *texts, f"run_dir={folder}", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    (message,) = [line for line in done.stderr.splitlines() if "a job of the sweep left no result" in line]
    assert "nothing.txt" in message
    assert "this command ends" not in message
    assert "of its runs 0" in message
    assert len(list((folder / ".submitit").rglob("*_log.err"))) == 4


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("seed=0,1", "trainer.devices=1,2"), "trainer.devices=2: in another run of the sweep it differs"),
        (
            ("seed=0,1", "trainer.devices=2", "hydra.launcher.tasks_per_node=3"),
            "hydra.launcher.tasks_per_node=3: trainer.devices=2 says how many processes a job has",
        ),
        (("seed=0", "hydra.launcher.partitio=x"), "hydra.launcher.partitio=x: Key 'partitio' not in"),
        (
            ("seed=0", "trainer.devices=2", "data.batch_size=2,3"),
            "data.batch_size=3: 2 processes share the rows of a batch",
        ),
    ],
)
def test_jobs_that_cannot_be_as_the_command_says_are_refused_before_any_starts(
    small_run: tuple[str, ...], words: tuple[str, ...], complaint: str, tmp_path: Path
) -> None:
    place = f"run_dir={tmp_path / 'sweep'}"
    done = run_script("train.py", "-m", *small_run, *words, "hydra/launcher=jobs_local", place, cwd=tmp_path)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert not (tmp_path / "sweep").exists()


def test_jobs_without_a_sweep_are_refused(small_run: tuple[str, ...], tmp_path: Path) -> None:
    place = f"run_dir={tmp_path / 'run'}"
    done = run_script("train.py", *small_run, "hydra/launcher=jobs_local", place, cwd=tmp_path)
    assert done.returncode == 2
    assert "hydra/launcher=jobs_local: it starts the runs of a sweep" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_launcher_that_does_not_exist_is_told_beside_those_that_do(tmp_path: Path) -> None:
    place = f"run_dir={tmp_path / 'sweep'}"
    done = run_script("train.py", "-m", "seed=0,1", "hydra/launcher=job_local", place, cwd=tmp_path)
    assert done.returncode == 2
    assert "hydra/launcher=job_local: allowed is basic, jobs_local, jobs_slurm" in done.stderr
    assert "hydra/launcher=jobs_local" in done.stderr.partition("try: ")[2]


def test_jobs_of_slurm_where_there_is_none_are_refused(small_run: tuple[str, ...], tmp_path: Path) -> None:
    words = ("-m", *small_run, "seed=0,1", "hydra/launcher=jobs_slurm", f"run_dir={tmp_path / 'sweep'}")
    done = run_script("train.py", *words, cwd=tmp_path, environment={"PATH": str(tmp_path)})
    assert done.returncode == 2
    assert "hydra/launcher=jobs_slurm: this machine has no srun" in done.stderr
    assert "hydra/launcher=jobs_local" in done.stderr.partition("try: ")[2]
    assert not (tmp_path / "sweep").exists()
