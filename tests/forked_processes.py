"""Processes that fork from one that has imported what takes seconds to import, and nothing of the project."""

import atexit
import gc
import inspect
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import weakref
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, NoReturn
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


def disown() -> None:
    """Leave what is to be done at the end of the parent, such as removing its temporary folders, to it."""
    atexit._clear()
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]
    weakref.finalize._registered_with_atexit = False  # type: ignore[attr-defined]


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


class ForkingPopen(subprocess.Popen[Any]):
    """Forks where another Python script is to be started; the rest is that of any process."""

    def _execute_child(self, *arguments: Any) -> None:
        given = inspect.signature(super()._execute_child).bind(*arguments).arguments
        # Whether it buffers what it prints, as torchrun asks, is of no matter here.
        words = given["args"]
        words = words if isinstance(words, str) else [word for word in words if word != "-u"]
        if isinstance(words, str) or words[0] != sys.executable or Path(words[1]).suffix != ".py":
            super()._execute_child(*arguments)
            return
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _become(words[1:], given)
        self._child_created = True
        self._close_pipe_fds(
            *(given[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite"))
        )


def _become(words: Sequence[str], given: Mapping[str, Any]) -> NoReturn:
    """Be the script that the parent asked for."""
    status = 1
    # Were it closed with its last reference, it would close what has its number by then.
    kept = sys.stdin, sys.stdout, sys.stderr  # noqa: F841
    try:
        disown()
        for number, name in enumerate(("p2cread", "c2pwrite", "errwrite")):
            if given[name] != -1:
                os.dup2(given[name], number)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if given["start_new_session"]:
            os.setsid()
        if given["process_group"] >= 0:
            os.setpgid(0, given["process_group"])
        if given["preexec_fn"] is not None:
            given["preexec_fn"]()
        environment = dict(os.environ if given["env"] is None else given["env"])
        _be_script(Path(words[0]), words[1:], Path(given["cwd"] or "."), environment)
        status = 0
    except SystemExit as left:
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
        else:
            status = left.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def _run(
    script: Path, arguments: tuple[str, ...], cwd: Path, environment: dict[str, str], streams: list[Path]
) -> None:
    disown()
    leave_unsynced()
    subprocess.Popen = ForkingPopen  # type: ignore[misc]
    for number, path in enumerate(streams):
        opened = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(opened, number)
        os.close(opened)
    _be_script(script, arguments, cwd, environment)


def _be_script(script: Path, arguments: Sequence[str], cwd: Path, environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
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
