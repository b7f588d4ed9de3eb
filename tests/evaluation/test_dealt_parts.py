"""Several processes score what one scores, to the bit, and go on with what others have left."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.parallel.processes import run_in_processes
from windowlm.errors import UserError
from windowlm.evaluation import dealt_parts, passes
from windowlm.evaluation.config import EvaluationConfig
from windowlm.evaluation.evaluate import evaluate_checkpoint
from windowlm.evaluation.kept_nats import UNFINISHED, KeptNats
from windowlm.evaluation.passes import Part, Pass
from windowlm.evaluation.target_losses import read_losses
from windowlm.parallel.own_gpu import own_gpu
from windowlm.parallel.place import Place
from windowlm.parallel.processes import Processes

from .test_evaluate import run  # noqa: F401

LENGTHS = [4, 8, 16]
PART_TOKENS = 100
FILES = ("length.json", "length.csv", "targets.json")


class StoppedError(Exception):
    """Stands for the end of the machine, between two rounds."""


def evaluate(processes: Processes, checkpoint: Path, folder: Path, rounds: int | None = None) -> int:
    """An evaluation that may end after some rounds; gives the parts that this process has kept."""
    kept: list[str] = []
    keep, outcome = KeptNats.keep, dealt_parts._outcome
    left = [] if rounds is None else [None] * (rounds + 1)

    def keeping(self: KeptNats, name: str, nats: np.ndarray) -> None:
        keep(self, name, nats)
        kept.append(name)

    def stopping(*arguments: Any) -> Any:
        if left:
            left.pop()
            if not left:
                raise StoppedError
        return outcome(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "PART_TOKENS", PART_TOKENS)
        patch.setattr("windowlm.evaluation.evaluate.html_page", lambda *_: b"page")
        patch.setattr("windowlm.evaluation.evaluate.length_plot", lambda _: b"plot")
        patch.setattr(KeptNats, "keep", keeping)
        patch.setattr(dealt_parts, "_outcome", stopping)
        with contextlib.suppress(StoppedError):
            evaluate_checkpoint(
                checkpoint,
                data={},
                evaluation=EvaluationConfig(context_lengths=LENGTHS, batch_tokens=64),
                device="cpu",
                output_dir=folder,
                processes=processes,
            )
    return len(kept)


def by_three(rank: int, checkpoint: Path, base: Path) -> list[int]:
    processes = Processes(Place(rank, 3, rank, 3))
    return [
        evaluate(processes, checkpoint, base / "three"),
        evaluate(processes, checkpoint, base / "handed on", rounds=2),
    ]


def by_two(rank: int, checkpoint: Path, base: Path) -> list[Any]:
    processes = Processes(Place(rank, 2, rank, 2))
    return [
        evaluate(processes, checkpoint, base / "two"),
        evaluate(processes, checkpoint, base / "handed on", rounds=3),
        # What is finished is not scored again.
        evaluate(processes, checkpoint, base / "two"),
        evaluate(processes, checkpoint, base / "begun by one"),
        score_some(processes, base / "whole", 1.0, 2.0, 3.0),
        score_some(processes, base / "wrong", 1.0, UserError("the loss is not finite"), 3.0),
    ]


def assert_equal(folder: Path, wanted: Path) -> None:
    for name in FILES:
        assert (folder / name).read_bytes() == (wanted / name).read_bytes(), name
    one, other = read_losses(folder / "losses.parquet"), read_losses(wanted / "losses.parquet")
    assert one.scoring_key == other.scoring_key
    for c in LENGTHS:
        assert one.nats[c].tobytes() == other.nats[c].tobytes()
        assert one.naive_nats[c].tobytes() == other.naive_nats[c].tobytes()
    assert not (folder / UNFINISHED).exists()
    assert not (folder / "earlier").exists()


def part_that(outcome: float | UserError) -> Part:
    def score(*_: object, **__: object) -> np.ndarray:
        if isinstance(outcome, UserError):
            raise outcome
        return np.full(2, outcome)

    return Part(targets=2, tokens=4, score=score)  # type: ignore[arg-type]


def score_some(processes: Processes, folder: Path, *outcomes: float | UserError) -> str | list[float]:
    parts = tuple(part_that(outcome) for outcome in outcomes)
    try:
        nats = dealt_parts.score_parts(
            torch.nn.Identity(),
            [Pass("protocol-4", "protocol", (4,), parts)],
            "hash",
            device=torch.device("cpu"),
            advance=lambda *_: None,
            kept=KeptNats(folder, "key"),
            processes=processes,
        )
    except UserError as error:
        return str(error)
    values: list[float] = nats["protocol"][4].tolist()
    return values


def test_several_processes_score_what_one_scores_to_the_bit_also_where_others_began(
    run: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    alone = Processes()
    parts = evaluate(alone, run, tmp_path / "one")
    assert parts > 25
    assert evaluate(alone, run, tmp_path / "begun by one", rounds=4) == 4
    # The leader alone writes.
    assert run_in_processes(3, by_three, run, tmp_path) == [[parts, 6], [0, 0], [0, 0]]
    leader, other = run_in_processes(2, by_two, run, tmp_path)
    assert leader[:4] == [parts, 6, 0, parts - 4]
    assert other[:4] == [0, 0, 0, 0]
    assert len(list((tmp_path / "handed on" / UNFINISHED).iterdir())) == 12
    assert evaluate(alone, run, tmp_path / "handed on") == parts - 12
    for name in ("two", "three", "handed on", "begun by one"):
        assert_equal(tmp_path / name, tmp_path / "one")
    # All get all in order, and all hear of a mistake that one has met.
    for found in (leader, other):
        assert found[4:] == [[1, 1, 2, 2, 3, 3], "the loss is not finite"]
    assert len(list((tmp_path / "wrong" / UNFINISHED).iterdir())) == 1


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    for name in ("SLURM_STEP_ID", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: True)
    device = torch.device("cuda")
    assert own_gpu(device, Place(3, 4, 1, 2), "devices") == torch.device("cuda", 1)
    assert chosen == [torch.device("cuda", 1)]
    assert own_gpu(device, Place(), "devices") == device
    assert own_gpu(torch.device("cpu"), Place(1, 3, 1, 3), "devices") == torch.device("cpu")
    with pytest.raises(UserError, match=r"3 processes on this machine, which shows 2 GPUs.*devices=2"):
        own_gpu(device, Place(0, 3, 0, 3), "devices")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    with pytest.raises(UserError, match=r"3 tasks.* 2 GPUs are shown to one.*--gpus-per-node=3"):
        own_gpu(device, Place(0, 3, 0, 3), "devices")
    # Processes that torchrun has started are no tasks of the step that it is in.
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="3 processes on this machine"):
        own_gpu(device, Place(0, 3, 0, 3), "devices")
    monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: False)
    with pytest.raises(UserError, match="NCCL"):
        own_gpu(device, Place(0, 2, 0, 2), "devices")
