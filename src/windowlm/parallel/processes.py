"""The processes of one command: who leads, what they tell one another, and what happens when one is lost."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from threading import Event, Thread
from types import FrameType
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from windowlm.errors import UserError
from windowlm.parallel.launcher import LAUNCHED, LOST
from windowlm.parallel.place import Place, own_place

ONE_ALONE = Place()
Result = TypeVar("Result")
# The others wait while the leader prepares data or evaluates. One that is gone is noticed at once.
PATIENCE = timedelta(days=7)
# All start at about the same time: one that is missing by then was not started, or looks elsewhere.
TIME_TO_MEET = timedelta(minutes=10)
# What a process has to end by itself once it could notice the loss: torchrun kills it after 30.
SECONDS_TO_UNWIND = 10.0
# Set once this process has told of a loss, or left that to another.
_told = Event()
# A prime, so that the ports of a job's steps seldom are those of the jobs beside it.
PORTS_OF_STEPS = 1009


class LostProcessError(Exception):
    """Another process of the run has ended, or cannot be reached."""


@dataclass(frozen=True)
class Processes:
    """Those that run one command; with one alone nothing is sent.

    Attributes:
        place: which of them this is.
    """

    place: Place = ONE_ALONE

    @classmethod
    def join(cls) -> "Processes":
        """Meet the others, where a launcher started some; those that met before stay together.

        Raises:
            UserError: the others do not come, or some machines have more processes than others.
            LostProcessError: a process is gone.
        """
        place = own_place()
        if place.size == 1:
            return cls()
        if dist.is_initialized():
            return cls(place)
        if "RANK" not in os.environ:
            _meet_by_job()
        # Where a torch without NCCL is asked to share GPUs, `check_gpus` says so.
        by_gpus = torch.cuda.is_available() and dist.is_nccl_available()
        store = _met(place)
        with _losses():
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if by_gpus else "gloo",
                store=store,
                rank=place.rank,
                world_size=place.size,
                timeout=PATIENCE,
            )
        joined = cls(place)
        counts = set(joined.gather(place.local_size))
        if len(counts) > 1:
            fewest, most = min(counts), max(counts)
            raise UserError(
                f"{most} processes on one machine and {fewest} on another: as many on each are allowed; try "
                f"torchrun --nproc-per-node {fewest}, or srun --ntasks-per-node {fewest}"
            )
        return joined

    @property
    def size(self) -> int:
        """How many there are."""
        return self.place.size

    @property
    def rank(self) -> int:
        """Which of them this is."""
        return self.place.rank

    @property
    def leads(self) -> bool:
        """Whether this one writes the run's files and screen."""
        return self.rank == 0

    @property
    def on_one_machine(self) -> bool:
        """Whether no network lies between them."""
        return self.place.local_size == self.size

    def wait(self) -> None:
        """Go on when all have come here.

        Raises:
            LostProcessError: one will not.
        """
        self.largest(torch.zeros(1))

    def share(self, value: Result) -> Result:
        """The leader's value, on each process.

        Raises:
            LostProcessError: a process is gone.
        """
        if self.size == 1:
            return value
        values: list[Any] = [value]
        with _losses():
            dist.broadcast_object_list(values, 0, device=torch.device("cpu"))
        shared: Result = values[0]
        return shared

    def gather(self, value: Result) -> list[Result]:
        """The value of each process in order, on each process.

        Raises:
            LostProcessError: a process is gone.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _losses():
            # Of several backends torch takes the CPU's for what lies there.
            dist.all_gather_object(values, value)
        return values

    def leader_first(self, work: Callable[[], Result]) -> Result:
        """What the work returns, done by the leader before the others begin; where that fails, all raise its
        exception.
        """
        results: list[Result] = []
        self.leader_alone(lambda: results.append(work()))
        return results[0] if self.leads else work()

    def leader_alone(self, work: Callable[[], object]) -> None:
        """Let the leader do it; where that fails, all raise its exception."""
        failure: Exception | None = None
        if self.leads:
            try:
                work()
            except Exception as error:
                if self.size == 1:
                    raise
                failure = error
        if (failure := self.share(failure)) is not None:
            raise failure

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over the processes."""
        return self._reduced(tensor, dist.ReduceOp.SUM)

    def largest(self, tensor: Tensor) -> Tensor:
        """The largest of each number over the processes."""
        return self._reduced(tensor, dist.ReduceOp.MAX)

    def _reduced(self, tensor: Tensor, operation: Any) -> Tensor:
        if self.size == 1:
            return tensor
        result = tensor.detach().clone()
        with _losses():
            dist.all_reduce(result, operation)
        return result


ALONE = Processes()


def nccl_options(*, high_priority: bool = False) -> Any:
    """Of a group of processes whose GPUs send; high priority where others' kernels are not to delay it."""
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=high_priority)
    options._timeout = PATIENCE  # torch warns of another than the group's
    return options


def leave_after_loss(saved: str) -> NoReturn:
    """End a process whose others are gone, with one message of all; our own launcher gives its own."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a launcher's to those that are left
        signal.signal(number, signal.SIG_IGN)
    tell_of_loss(saved)
    _leave(LOST)


def tell_of_loss(saved: str) -> None:
    """Say that another process has ended, if this one is to: the first that wants to, or else the leader.

    Args:
        saved: what the message says about the work so far.
    """
    _told.set()
    if LAUNCHED not in os.environ and _is_first_to_tell():
        print(f"error: another process of this run has ended; {saved}", file=sys.stderr)


def _is_first_to_tell() -> bool:
    # What `torchrun` keeps for its processes outlives each of them; otherwise it ends with the leader.
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        with suppress(RuntimeError, ValueError):
            return dist.distributed_c10d._get_default_store().add("windowlm told of a loss", 1) == 1
    return own_place().rank == 0


@contextmanager
def noticing_losses(processes: Processes, saved: Callable[[], str]) -> Iterator[None]:
    """Within it a process ends some seconds behind the loss of another, also where it waits for its GPU.

    Where the work fails on this process, that ends it, in its own time.

    A GPU that waits for one that is gone does so for ever, and so does a host that waits for it and looks at
    nothing else. A thread waits for a word of the process before this one, which comes at the end of what is
    within, or never; the process behind this one then misses this one.

    Args:
        processes: all of the command.
        saved: gives what the message says about the work so far.
    """
    if processes.size == 1:
        yield
        return
    with _losses():
        ring = dist.new_group(backend="gloo", timeout=PATIENCE)

    failed = Event()

    def wait_for_word() -> None:
        try:
            dist.recv(torch.empty(1), (processes.rank - 1) % processes.size, ring)
        except RuntimeError:
            time.sleep(SECONDS_TO_UNWIND)
            if failed.is_set():
                return
            try:
                if not _told.is_set():
                    tell_of_loss(saved())
            finally:
                _leave(LOST)

    waiting = Thread(target=wait_for_word, daemon=True)
    waiting.start()
    try:
        yield
    except BaseException as error:
        if not is_loss(error):
            failed.set()
        raise
    with _losses():
        dist.send(torch.empty(1), (processes.rank + 1) % processes.size, ring)
    waiting.join()
    dist.destroy_process_group(ring)


@contextmanager
def ending_together(processes: Processes, saved: str) -> Iterator[None]:
    """Within it a lost process, SIGINT or SIGTERM ends this one at once, with one message of all.

    A launcher sends SIGTERM to those that are left when one has failed, and a terminal SIGINT to all. Of one
    process alone SIGTERM does the same, with what is under way closed first.

    Args:
        processes: all of the command.
        saved: what the message says about the work so far.
    """
    if processes.size == 1:
        with _ending_alone(saved):
            yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        if processes.leads:
            print(f"stopped: {signal.Signals(number).name} received; {saved}", file=sys.stderr)
        _leave(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except Exception as error:
        if is_loss(error):
            leave_after_loss(saved)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _ending_alone(saved: str) -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    except SystemExit as left:
        if left.code == 128 + signal.SIGTERM:
            print(f"stopped: SIGTERM received; {saved}", file=sys.stderr)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _leave(status: int) -> NoReturn:
    """Exit without the end of the libraries, which would wait for the others as they shut down."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


@contextmanager
def _losses() -> Iterator[None]:
    """Errors of the connection as `LostProcessError`."""
    try:
        yield
    except RuntimeError as error:
        raise LostProcessError(str(error).partition("\n")[0]) from None


def is_loss(error: BaseException) -> bool:
    """Whether an error, or one behind it, says that another process is gone."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    return any(map(_says_loss, chain))


def _says_loss(error: BaseException) -> bool:
    if isinstance(error, LostProcessError | dist.DistBackendError | dist.DistNetworkError):
        return True
    # Gloo has no class of its own for it, but names the file of its connections.
    return isinstance(error, RuntimeError) and (
        "gloo/transport" in str(error) or "Connection closed" in str(error)
    )


def _met(place: Place) -> Any:
    """What the processes know one another by, once all are there.

    Raises:
        UserError: they are not within `TIME_TO_MEET`, or cannot meet there.
    """
    try:
        store, _, _ = next(rendezvous("env://", place.rank, place.size, timeout=TIME_TO_MEET))
        store.set_timeout(PATIENCE)
        # A launcher keeps notes of its own there.
        return dist.distributed_c10d.PrefixStore("windowlm", store)
    except RuntimeError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"process {place.rank} of {place.size} did not meet the others at {where} ({reason}); "
            "MASTER_ADDR=HOST and MASTER_PORT=PORT before the command name another place"
        ) from None


def _meet_by_job() -> None:
    """Set what torch reads: the step's first node, and a port by the numbers of job and step."""
    job = os.environ.get("SUBMITIT_LOCAL_JOB_ID")
    first = "127.0.0.1"
    if job is None:
        from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

        job = os.environ.get("SLURM_JOB_ID", "0")
        # A job may hold more nodes than one of its steps, and several steps at a time.
        nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST", first)
        first = SLURMEnvironment.resolve_root_node_address(nodes)
    step = os.environ.get("SLURM_STEP_ID", "0")
    port = 15000 + (int(job) + PORTS_OF_STEPS * (int(step) if step.isdecimal() else 0)) % 10000
    os.environ.setdefault("MASTER_ADDR", first)
    os.environ.setdefault("MASTER_PORT", str(port))
