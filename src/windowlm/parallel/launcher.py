"""Start a command as several processes of this machine, and end all when one fails; loads no torch."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType

from windowlm.parallel.place import own_place

# Set for processes of this launcher, which reports a lost one itself.
LAUNCHED = "WINDOWLM_LAUNCHED"
# Status of those that are left when another has ended; a process that fails by itself has it too.
LOST = 1
# What they have to notice the end of one, and to save after a signal, before they are killed.
SECONDS_AFTER_FAILURE = 15.0
POLL_SECONDS = 0.1
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def starter(environment: Mapping[str, str] = os.environ) -> str:
    """The words with which the user started the script of this process."""
    place = own_place(environment)
    if place.size == 1 or LAUNCHED in environment:
        return "python"
    if "RANK" not in environment:
        return "srun python" if "SLURM_PROCID" in environment else "python"
    if "TORCHELASTIC_RUN_ID" not in environment:
        return "python"
    nodes = place.size // place.local_size
    on_nodes = f"--nnodes {nodes} " if nodes > 1 else ""
    return f"torchrun {on_nodes}--nproc-per-node {place.local_size}"


def launch(count: int, command: Sequence[str], saved: str) -> int:
    """Run the command in so many processes, numbered as `torchrun` numbers them.

    Signals are passed on. When a process fails, the others get some seconds to end by themselves, then a
    SIGTERM, then a SIGKILL.

    Args:
        count: how many.
        command: its words.
        saved: what to tell about the work so far where a process was killed.

    Returns:
        The status of the first that failed, the highest status where none did.
    """
    assert own_place().size == 1
    environment = {
        "OMP_NUM_THREADS": str(threads_of_each(count)),
        **os.environ,
        LAUNCHED: "1",
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "GROUP_RANK": "0",
        # By this Lightning knows that its processes were started.
        "TORCHELASTIC_RUN_ID": f"windowlm-{os.getpid()}",
    }
    processes: list[subprocess.Popen[bytes]] = []

    def forward(number: int, frame: FrameType | None) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        for rank in range(count):
            own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            # In a group of their own, so that a terminal's Ctrl-C reaches them once.
            processes.append(
                subprocess.Popen(command, env=own, process_group=0, preexec_fn=_end_with_the_launcher)
            )
        return _watched(processes, saved)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _watched(processes: list[subprocess.Popen[bytes]], saved: str) -> int:
    while True:
        statuses = [process.poll() for process in processes]
        killed = [rank for rank, status in enumerate(statuses) if status is not None and status < 0]
        failed = [status for status in statuses if status]
        if None not in statuses and not killed:
            return max((status for status in failed if status), default=0)
        if failed:
            break
        time.sleep(POLL_SECONDS)
    for end in (None, signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            if end is not None and process.poll() is None:
                process.send_signal(end)
        deadline = time.monotonic() + SECONDS_AFTER_FAILURE
        while time.monotonic() < deadline and any(process.poll() is None for process in processes):
            time.sleep(POLL_SECONDS)
        if end is None:
            # The first to be seen may be one that lost another, whose end is what counts.
            killed = killed or [r for r, process in enumerate(processes) if (process.poll() or 0) < 0]
    if killed:
        name = signal.Signals(-(processes[killed[0]].poll() or 0)).name
        print(
            f"error: process {killed[0]} of {len(processes)} was ended by {name}, and with it all others; "
            f"{saved}",
            file=sys.stderr,
        )
        return 1
    ended = [process.poll() or 0 for process in processes]
    # One that a signal has stopped may have said nothing; one that failed has.
    stopped = [rank for rank, status in enumerate(ended) if status == os.EX_TEMPFAIL]
    if stopped and LOST in ended:
        print(
            f"error: process {stopped[0]} of {len(processes)} ended with status {ended[stopped[0]]}, "
            f"and with it all others; {saved}",
            file=sys.stderr,
        )
    return max(ended)


def _end_with_the_launcher() -> None:
    """Have this process told to save and end where the launcher is killed, which could not tell it.

    Linux alone has that: prctl's PR_SET_PDEATHSIG.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def threads_of_each(count: int) -> int:
    """Of so many processes that share this machine's cores."""
    return max(1, (os.cpu_count() or 1) // count)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port
