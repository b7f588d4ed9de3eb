"""Runs of several processes that were killed or stopped end as if nothing had been, bit for bit."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from torch.multiprocessing.spawn import ProcessExitedException

from tests.parallel.processes import run_in_processes
from tests.training.runs import begin, steps_saved
from windowlm.parallel.launcher import LAUNCHED
from windowlm.training.lightning_module import LanguageModelModule
from windowlm.training.same_run import differences

# Larger than the first of the buckets in which DDP sums gradients (1 MiB), so that there are several.
WIDE = {"dim": 128, "heads": 4, "head_dim": 32, "feed_forward_dim": 512, "layers": 2}
DDP: dict[str, Any] = {
    "model": WIDE,
    "data": {"batch_size": 6},
    "trainer": {"accumulate_batches": 2, "device": "cpu"},
}
OTHERS = ("fsdp2", "context")


def become(rank: int, size: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", LAUNCHED: "1"}


def ddp(folder: Path, texts: Path) -> int:
    return begin(folder, texts, folder.parent / "cache", **{name: dict(group) for name, group in DDP.items()})


def begin_and_be_killed(rank: int, size: int, base: Path, texts: Path) -> None:
    """A run whose last process is killed in the second half of its fourth step."""
    become(rank, size)
    step = LanguageModelModule.training_step

    def killing(self: LanguageModelModule, *arguments: Any) -> Any:
        if self.batches_trained == 7 and rank == size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *arguments)

    LanguageModelModule.training_step = killing  # type: ignore[method-assign]
    ddp(base / "killed", texts)


def go_on(rank: int, size: int, base: Path, texts: Path) -> list[int]:
    """The killed run to its end, one that nothing stopped, and the like in other ways of sharing."""
    become(rank, size)
    statuses = [ddp(base / "killed", texts), ddp(base / "whole", texts)]
    for kind in OTHERS:
        shared = {"parallel": {"kind": kind}, "model": {"attention_dropout": 0.0}}
        for name, limits in (("stopped", [1e-9, None]), ("whole", [None])):
            for limit in limits:
                trainer = {"device": "cpu", "max_time": limit}
                folder = base / f"{kind} {name}"
                statuses.append(begin(folder, texts, base / "cache", trainer=trainer, **shared))
    return statuses


def go_on_with_three(rank: int, base: Path, texts: Path) -> list[int]:
    """The same of runs by DDP alone."""
    become(rank, 3)
    return [ddp(base / "killed", texts), ddp(base / "whole", texts)]


def test_runs_of_two_processes_go_on_bit_by_bit(documents: Path, tmp_path: Path) -> None:
    with pytest.raises(ProcessExitedException):
        run_in_processes(2, begin_and_be_killed, 2, tmp_path, documents)
    assert steps_saved(tmp_path / "killed") == 2
    assert run_in_processes(2, go_on, 2, tmp_path, documents) == [[0, 0, 75, 0, 0, 75, 0, 0]] * 2
    assert differences(tmp_path / "killed", tmp_path / "whole") == []
    for kind in OTHERS:
        assert differences(tmp_path / f"{kind} stopped", tmp_path / f"{kind} whole") == []


def test_runs_of_three_processes_go_on_bit_by_bit(documents: Path, tmp_path: Path) -> None:
    """The sum of three depends on the order, which DDP's buckets decide."""
    with pytest.raises(ProcessExitedException):
        run_in_processes(3, begin_and_be_killed, 3, tmp_path, documents)
    assert run_in_processes(3, go_on_with_three, tmp_path, documents) == [[0, 0]] * 3
    assert differences(tmp_path / "killed", tmp_path / "whole") == []
