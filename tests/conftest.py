"""Documents to train on, and one finished run that many tests look at."""

import copy
import fcntl
import gc
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests.forked_processes import cache_home, leave_unsynced, run_forked

leave_unsynced()

# Draws of minutes, for pytest --hypothesis-profile=long; other tests are run as they are.
hypothesis.settings.register_profile("short", deadline=None)
hypothesis.settings.register_profile("long", max_examples=20_000, deadline=None)
hypothesis.settings.load_profile("short")

PROJECT = Path(__file__).parents[1]
SENTENCE = "the small window sees few keys and the cache stays short while long text waits outside"
WORDS = SENTENCE.split()
LONG = ("parallel", "scripts", "training")  # folders of tests that start processes
MakeOnce = Callable[[str, Callable[[Path], object]], Path]

# A model that trains in seconds.
SMALL_RUN = (
    "tokenizer=bytes",
    "model.layers=1",
    "model.dim=32",
    "model.heads=2",
    "model.kv_heads=1",
    "model.head_dim=16",
    "model.feed_forward_dim=32",
    "model.window=16",
    "data.sequence_length=64",
    "data.batch_size=2",
    "data.validation_tokens=512",
    "evaluation.max_targets=512",
    "trainer.log_every_n_steps=2",
    "trainer.progress_bar=off",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first: at the end processes share short ones, and none waits for the last of another."""
    items.sort(key=lambda item: item.path.parent.name not in LONG)


def pytest_collection_finish() -> None:
    """Leave what was imported out of later collections of garbage: runs ask for one before they measure."""
    import torch  # which the process that hands out tests does without

    # Tensors here are tiny: more threads only wait for one another, and long where cores are shared.
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()


def write_documents(folder: Path, count: int = 40) -> Path:
    """Text files of some hundred bytes each, the same every time."""
    folder.mkdir(parents=True)
    draw = random.Random(0)
    for number in range(count):
        text = " ".join(draw.choices(WORDS, k=80))
        (folder / f"document {number:02d}.txt").write_text(f"{number} {text} ü€\n", encoding="utf-8")
    return folder


def run_script(
    script: str,
    *arguments: str,
    cwd: Path,
    environment: Mapping[str, str] | None = None,
    input: str = "",
    timeout: int = 240,
) -> subprocess.CompletedProcess[str]:
    """Run a script of the clone in a process of its own, from another folder."""
    whole = {**script_environment(cwd), **(environment or {})}
    return run_forked(PROJECT / script, arguments, cwd, whole, input, timeout)


def start_script(
    script: str, *arguments: str, cwd: Path, timeout: int = 240
) -> subprocess.CompletedProcess[str]:
    """Run a script as a user would, by an interpreter that has imported nothing, which takes seconds."""
    return subprocess.run(
        [sys.executable, str(PROJECT / script), *arguments],
        cwd=cwd,
        env=script_environment(cwd),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=timeout,
        check=False,
    )


def script_environment(home: Path) -> dict[str, str]:
    """The environment of a script that finds nothing of the user's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "HYDRA"))}
    caches = {"HOME": str(home), "XDG_CACHE_HOME": cache_home()}
    one_thread = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**kept, **caches, **one_thread, "COLUMNS": "120"}


@pytest.fixture(autouse=True, scope="session")
def read_once() -> Iterator[None]:
    """Have Hydra parse each YAML once, which it does at every composition, and compose twice a command.

    It composes a third time to learn its mode, which is that of the command line: no YAML sets one.
    """
    from hydra._internal.core_plugins.file_config_source import FileConfigSource
    from hydra._internal.core_plugins.importlib_resources_config_source import ImportlibResourcesConfigSource
    from hydra._internal.hydra import Hydra

    results: dict[tuple[str, str], Any] = {}

    def reading(read: Callable[..., Any]) -> Callable[..., Any]:
        def load_config(self: Any, config_path: str) -> Any:
            key = (self.path, config_path)
            if key not in results:
                results[key] = read(self, config_path)
            return copy.deepcopy(results[key])

        return load_config

    with pytest.MonkeyPatch.context() as patch:
        for source in (FileConfigSource, ImportlibResourcesConfigSource):
            patch.setattr(source, "load_config", reading(source.load_config))
        patch.setattr(Hydra, "get_mode", lambda *_, **__: None)
        yield


@pytest.fixture
def no_kernels() -> Iterator[None]:
    """Compile graphs, cut into their two passes, and no kernels, which takes minutes on a CPU."""
    import torch

    with torch.compiler.set_stance("default", force_backend="aot_eager_decomp_partition"):
        yield


@pytest.fixture(scope="session")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose name holds every character that command lines dislike."""
    return write_documents(tmp_path_factory.mktemp("text") / "it's a [folder], k=v")


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs and caches of the tests go."""
    return tmp_path_factory.mktemp("workplace")


@pytest.fixture(scope="session")
def small_run(documents: Path, workplace: Path) -> tuple[str, ...]:
    """Overrides of a run that takes seconds."""
    return (*SMALL_RUN, f"data.path={documents}", f"data.cache_dir={workplace / 'cache'}")


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> MakeOnce:
    """A folder for all processes of the tests: the first that asks fills it, and others wait."""
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent

    def made(name: str, make: Callable[[Path], object]) -> Path:
        folder, finished = shared / name, shared / f"{name}.finished"
        with (shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not finished.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                finished.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def finished_run(small_run: tuple[str, ...], made_once: MakeOnce) -> tuple[Path, str]:
    """Folder and screen of a run of twelve steps."""

    def make(folder: Path) -> None:
        words = (*small_run, "trainer.max_steps=12", "run_dir=finished run, 1", "logger.tags=[test]")
        done = run_script("train.py", *words, cwd=folder)
        assert done.returncode == 0, done.stderr
        (folder / "screen.txt").write_text(done.stdout, encoding="utf-8")

    folder = made_once("finished", make)
    return folder / "finished run, 1", (folder / "screen.txt").read_text(encoding="utf-8")
