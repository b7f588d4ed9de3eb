"""Processes that fork from one that has imported what takes seconds to import, and nothing of the project."""

import atexit
import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from unittest import mock

PROJECT = Path(__file__).parents[1]
PRELOADED = (
    # A run on W&B imports the second, which takes seconds once much else is imported.
    "wandb",
    "wandb.sdk.launch.inputs.internal",
    "altair",
    "datasets",
    "hydra.main",
    "lightning.pytorch",
    "omegaconf",
    "pydantic",
    "rich.console",
    "scipy.stats",
    "tokenizers",
    "torch",
    "transformers",
    "vl_convert",
)
STARTING = threading.Lock()


@cache
def cache_home() -> str:
    """Where scripts keep what takes long to make and is the same each time."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return folder.name


def forking_context() -> ForkServerContext:
    """The processes of this context fork from one that has imported, and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    with STARTING:
        start_server()
    return context


@cache
def start_server() -> None:
    forkserver.set_forkserver_preload(list(PRELOADED))
    # A process with threads cannot be forked.
    with mock.patch.dict(os.environ, XDG_CACHE_HOME=cache_home(), OMP_NUM_THREADS="1"):
        forkserver.ensure_running()


def leave_unsynced() -> None:
    """Do not wait for the disk: without a sync too, what is written outlives the process."""
    os.fsync = lambda descriptor: None


def run_forked(
    script: Path,
    arguments: tuple[str, ...],
    cwd: Path,
    environment: Mapping[str, str],
    input: str,
    timeout: float,
) -> subprocess.CompletedProcess[str]:
    """Run a script as ``subprocess.run`` would, with the script's own modules imported anew."""
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder) / name for name in ("stdin", "stdout", "stderr")]
        streams[0].write_text(input, encoding="utf-8")
        process = forking_context().Process(
            target=_run, args=(script, arguments, cwd, dict(environment), streams)
        )
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired([str(script), *arguments], timeout)
        stdout, stderr = (path.read_text(encoding="utf-8") for path in streams[1:])
    return subprocess.CompletedProcess([str(script), *arguments], process.exitcode, stdout, stderr)


def _run(
    script: Path, arguments: tuple[str, ...], cwd: Path, environment: dict[str, str], streams: list[Path]
) -> None:
    leave_unsynced()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, path in enumerate(streams):
        opened = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
    # What pytest adds is not there when a user starts the script.
    added = {"", str(PROJECT), str(PROJECT / "scripts")}
    sys.path[:] = [str(script.parent), *(path for path in sys.path if path not in added)]
    sys.argv = [str(script), *arguments]
    multiprocessing.set_start_method(None, force=True)
    # The project is compiled once, also where the environment would have it compiled at every start.
    sys.dont_write_bytecode, sys.pycache_prefix = False, environment["XDG_CACHE_HOME"]
    # Runs ask for a collection of garbage before they measure.
    gc.freeze()
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        # The process ends without them otherwise.
        atexit._run_exitfuncs()
